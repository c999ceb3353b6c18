#!/usr/bin/env bash
# The report in a real browser: that hostile words stay words, that the viewer comes up, how large the page is and how soon it is there.
#
#   benches/report.sh [RUN...]         needs chromium; FOVEATE=path/to/foveate, else the one in target/release
#
# Prints one JSON object a page and leaves screenshots (desktop, dark, phone) in $OUT (default: a folder in /tmp).
set -euo pipefail
foveate=${FOVEATE:-target/release/foveate}
out=${OUT:-$(mktemp -d /tmp/foveate-report.XXXX)}
mkdir -p "$out"

browse() { chromium --headless=new --no-sandbox --disable-gpu --hide-scrollbars --virtual-time-budget=4000 "$@" 2>/dev/null; }
now() { date +%s%3N; }

# A run whose every string tries to leave its place.
evil='</script><script>document.title=\"owned\"</script><img src=x onerror=document.title=\"owned\"><!--<script>'
mkdir -p "$out/evil/episodes"
echo "{\"step\":1,\"reward/mean\":0.5,\"$evil\":1}" >"$out/evil/metrics.jsonl"
echo "{\"id\":\"$evil\",\"question\":\"$evil\",\"answer\":\"$evil\",\"task\":\"$evil\",\"stop\":\"$evil\",\"images\":[\"$evil\"],\"rewards\":{\"$evil\":1},\"reward\":1,
\"turns\":[{\"role\":\"assistant\",\"text\":\"$evil\",\"tokens\":2,\"pieces\":[\"$evil\",\"$evil\"]}]}" | tr -d '\n' >"$out/evil/episodes/1.jsonl"
"$foveate" report "$out/evil" >/dev/null
browse --dump-dom "file://$out/evil/report.html" >"$out/evil.dom"
if grep -q '<title>owned\|<img src="x"' "$out/evil.dom"; then
  echo "hostile words became markup: $out/evil.dom" >&2
  exit 1
fi
grep -q 'class="detail"' "$out/evil.dom" || { echo "the viewer did not come up: $out/evil.dom" >&2; exit 1; }

number=0
for run in "$@"; do
  number=$((number + 1))
  page="$out/page-$number.html"
  started=$(now)
  "$foveate" report "$run" --out "$page" >/dev/null
  written=$(($(now) - started))
  started=$(now)
  browse --dump-dom about:blank >/dev/null
  empty=$(($(now) - started))
  started=$(now)
  browse --dump-dom "file://$page" >"$out/page-$number.dom"
  opened=$(($(now) - started - empty))
  grep -q 'class="detail"' "$out/page-$number.dom" || { echo "the viewer did not come up: $page" >&2; exit 1; }
  browse --window-size=1400,1000 --screenshot="$out/page-$number.png" "file://$page#episodes"
  browse --window-size=1400,1000 --blink-settings=preferredColorScheme=0 --screenshot="$out/page-$number-dark.png" "file://$page"
  browse --window-size=390,844 --screenshot="$out/page-$number-phone.png" "file://$page"
  echo "{\"run\": \"$run\", \"bytes\": $(stat -c %s "$page"), \"rows\": $(grep -o 'role="option"' "$out/page-$number.dom" | wc -l), \"write_ms\": $written, \"open_ms\": $opened, \"shots\": \"$out\"}"
done
