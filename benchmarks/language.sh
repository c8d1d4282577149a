#!/usr/bin/env bash
# All benchmarks of language models: PYTHON OUT ROUNDS DATA. Training the small model takes half an hour on two cores, once.
# Figures go to .bench-cache/*.json, tables to standard output.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 out=$2 rounds=$3 data=${4:-}
[ -n "$data" ] || { echo "DATA=FOLDER is needed: lm_wikitext2/, lm_tinyshakespeare/, model_stories260K/" >&2; exit 2; }
mkdir -p .bench-cache
[ -f .bench-cache/lm/training.json ] && [ -f .bench-cache/lm/calibration.txt ] ||
  "$python" benchmarks/train_language_model.py --data "$data" --out .bench-cache/lm --steps 600
"$python" benchmarks/stories.py --data "$data/model_stories260K" --json .bench-cache/stories.json
"$python" benchmarks/language_quality.py --model .bench-cache/lm --json .bench-cache/language_quality.json
for shape in smollm2-135m qwen2.5-0.5b lfm2-350m; do
  [ -f ".bench-cache/shapes/$shape/model.safetensors" ] ||
    "$python" benchmarks/language_shapes.py --tokenizer .bench-cache/lm --out .bench-cache/shapes --only "$shape"
  artifacts=()
  for precision in int4-weights dual int8-dynamic; do
    recipe=.bench-cache/$shape-$precision.toml
    printf '[model]\nsource = "shapes/%s"\n[build]\nprecision = "%s"\nkeep_all = true\nmeasure = false\n' \
      "$shape" "$precision" > "$recipe"
    if [ "$precision" != int8-dynamic ]; then
      printf '[passes.int4-weights]\nblock_size = 128\n' >> "$recipe"
    fi
    [ -f "$out/$shape-$precision/manifest.json" ] ||
      "$(dirname "$python")/onnxpress" build "$recipe" --out "$out/$shape-$precision"
    artifacts+=("$precision=$out/$shape-$precision")
  done
  "$python" benchmarks/language_speed.py --model ".bench-cache/shapes/$shape" --artifact "${artifacts[@]}" \
    --rounds "$rounds" --json ".bench-cache/language_speed_$shape.json"
  "$python" benchmarks/language_load.py --model ".bench-cache/shapes/$shape" --artifact "${artifacts[@]}" \
    --rounds "$rounds" --json ".bench-cache/language_load_$shape.json"
done
"$python" benchmarks/language_roofline.py --artifact "$out/qwen2.5-0.5b-int4-weights" --json .bench-cache/language_roofline.json
"$python" benchmarks/language_serving.py --artifact "$out/qwen2.5-0.5b-dual" --rounds "$rounds" \
  --json .bench-cache/language_serving.json
