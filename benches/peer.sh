#!/usr/bin/env bash
# One MGPO step against the Python stack (benches/peer.py: transformers on PyTorch), interleaved, medians and ratios.
#
#   PYTHON=/path/to/venv/bin/python benches/peer.sh MODEL [ROUNDS] [-- extra arguments of both]
#
# MODEL is a preset of `foveate model new` (nano, mini) or a checkpoint folder. The virtual environment needs torch,
# torchvision, transformers, pillow. Everything is drawn and written under runs/bench; THREADS (default 2) holds for both.
#
# DEVICE=cuda compares on a GPU, ours through LibTorch; FOVEATE is then a program built with it, and what ours alone takes stands in OURS:
#   tests/engines/torch.sh cargo build --release --features torch
#   DEVICE=cuda DTYPES=bfloat16 PEER_MICRO_BATCH=8 OURS=--recompute tests/engines/torch.sh env FOVEATE=target/torch/release/foveate \
#     PYTHON=/path/to/venv/bin/python benches/peer.sh qwen2.5-vl-3b 3 -- --kl 0
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:?set PYTHON to an interpreter that has torch and transformers}
model=${1:?usage: benches/peer.sh MODEL [ROUNDS] [-- ARGUMENTS]}
rounds=3
shift
if [[ $# -gt 0 && $1 != -- ]]; then rounds=$1; shift; fi
[[ ${1:-} == -- ]] && shift
threads=${THREADS:-2}
# Two sequences at a time were the fastest of 2 and 8 (LOG.md).
micro=${PEER_MICRO_BATCH:-2}
# bfloat16: our products on the processor's tiles, the peer's model in bfloat16 as a whole; bf16x6 is a way of ours alone.
dtypes=${DTYPES:-float32 bf16x6 bfloat16}
out=runs/bench
mkdir -p "$out"

foveate=${FOVEATE:-target/release/foveate}
[[ -n ${FOVEATE:-} ]] || cargo build --release --quiet
read -ra ours <<< "${OURS:-}"
[[ -z ${DEVICE:-} ]] || set -- "$@" --device "$DEVICE"
if [[ ! -d $model ]]; then
  [[ -d $out/$model ]] || "$foveate" model new --preset "$model" --out "$out/$model" >/dev/null
  name=$model
  model=$out/$model
else
  name=$(basename "$model")
fi
[[ -d $out/plates ]] || "$foveate" data make plates --train 64 --test 4 --out "$out/plates" >/dev/null
# Eight boxes a row, about a sixth of the picture's width, spread around the target.
"$python" - "$out" <<'PY'
import json, os, random, sys
out, random_ = sys.argv[1], random.Random(1)
with open(f"{out}/rows.jsonl", "w") as f:
    seen = set()
    for line in open(f"{out}/plates/train.jsonl"):
        row = json.loads(line)
        if row["images"][0] in seen:
            continue
        seen.add(row["images"][0])
        x1, y1, x2, y2 = row["targets"][0]["bbox"]
        boxes = []
        for _ in range(8):
            w, h = random_.randint(280, 440), random_.randint(280, 440)
            cx, cy = (x1 + x2) // 2 + random_.randint(-60, 60), (y1 + y2) // 2 + random_.randint(-60, 60)
            left, top = max(0, min(2016 - w, cx - w // 2)), max(0, min(1512 - h, cy - h // 2))
            boxes.append([left, top, left + w, top + h])
        f.write(json.dumps({"image": os.path.abspath(f"{out}/plates/{row['images'][0]}"), "question": row["question"], "boxes": boxes}) + "\n")
PY

results=$out/$name.jsonl
: > "$results"
for _ in $(seq "$rounds"); do
  for dtype in $dtypes; do
    "$foveate" bench step --threads "$threads" --model "$model" --rows "$out/rows.jsonl" --steps 2 --dtype "$dtype" "${ours[@]}" "$@" >> "$results"
    [[ $dtype == bf16x6 ]] && continue
    "$python" benches/peer.py --threads "$threads" --model "$model" --rows "$out/rows.jsonl" --steps 1 --dtype "$dtype" \
      --micro-batch "$micro" "$@" 2> "$out/peer.err" >> "$results" || { tail -3 "$out/peer.err" >&2; exit 1; }
  done
done

"$python" - "$results" <<'PY'
import json, statistics, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
sides = {}
for row in rows:
    sides.setdefault((row["impl"], row["dtype"]), []).append(row)
first = rows[0]
peers = {dtype: side for (impl, dtype), side in sides.items() if impl == "transformers"}
base_dtype = "float32" if "float32" in peers else next(iter(peers))
base = peers[base_dtype]
print(f"{first['params'] / 1e6:.1f} M parameters, {first['prompts']} prompts x {first['group']}, new tokens {first['new_tokens']}, "
      f"{first['threads']} threads, medians of {len(next(iter(sides.values())))} interleaved rounds; ratios are over transformers in " + base_dtype)
print(f"{'':24}{'tokens':>8}" + "".join(f"{part + ' s':>10}{'ratio':>7}" for part in ("turn1", "turn2", "ref", "update", "total")) + f"{'MiB':>8}{'share':>7}")
for (impl, dtype), side in sides.items():
    line = f"{impl + ' ' + dtype:24}{side[0]['mean_sequence_tokens']:8}"
    for part in ("turn1", "turn2", "ref", "update", "total"):
        ours, theirs = (statistics.median(r["seconds"][part] for r in s) for s in (side, base))
        line += f"{ours:10.3f}{theirs / ours if ours else float('nan'):7.1f}"
    ours, theirs = (max(r["peak_rss_mib"] for r in s) for s in (side, base))
    print(line + f"{ours:8}{ours / theirs:7.3f}")
PY
