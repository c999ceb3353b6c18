#!/usr/bin/env bash
# How the cost of one MGPO step grows: with the members of a group at one prompt, and with the tokens of the prompt.
# Crops have 169 visual tokens at most.
#
#   benches/scaling.sh MODEL     MODEL as in peer.sh, whose rows it uses (run that first)
set -euo pipefail
cd "$(dirname "$0")/.."
model=${1:?usage: benches/scaling.sh MODEL}
threads=${THREADS:-2}
[[ -d $model ]] || model=runs/bench/$model
step() { target/release/foveate bench step --threads "$threads" --model "$model" --rows runs/bench/rows.jsonl --prompts 1 --steps 2 "$@"; }
field() { sed -E "s/.*\"$1\":([0-9.]+).*/\1/"; }

echo "group   tokens  turn1    turn2    ref      update   total    MiB      (one prompt of 1,280 visual tokens)"
for group in 1 2 4 8 16 32; do
  row=$(step --group "$group" --max-pixels 1003520 --crop-max-pixels 132496)
  printf '%-7s %-7s' "$group" "$(field mean_sequence_tokens <<< "$row")"
  for f in turn1 turn2 ref update total peak_rss_mib; do printf ' %-8s' "$(field "$f" <<< "$row")"; done
  echo
done
echo
echo "visual  tokens  turn1    turn2    ref      update   total    MiB      (a group of 8)"
for visual in 256 512 1024 2048 4096 8192; do
  row=$(step --group 8 --max-pixels $((visual * 784)) --min-pixels $((visual * 784 * 9 / 10)) --crop-max-pixels 132496)
  printf '%-7s %-7s' "$visual" "$(field mean_sequence_tokens <<< "$row")"
  for f in turn1 turn2 ref update total peak_rss_mib; do printf ' %-8s' "$(field "$f" <<< "$row")"; done
  echo
done
