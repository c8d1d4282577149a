#!/usr/bin/env bash
# Makes an environment for each tool that benchmarks compare with, in .venv-peers. Runs again only where pins changed.
# PyTorch's CPU build is enough; where pip would take a CUDA build, install the CPU one into these environments first.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
for pins in benchmarks/peers/requirements-*.txt; do
  name=$(basename "$pins" .txt)
  folder=.venv-peers/${name#requirements-}
  if [ -f "$folder/.pins" ] && cmp -s "$pins" "$folder/.pins"; then
    continue
  fi
  echo "== making $folder"
  "$python" -m venv "$folder"
  "$folder/bin/python" -m pip install --quiet --upgrade pip
  "$folder/bin/python" -m pip install --quiet --requirement "$pins"
  cp "$pins" "$folder/.pins"
done
