#!/usr/bin/env bash
# Makes the environments of the tools that benchmarks compare with, .venv-peers/NAME from requirements-NAME.txt.
# Without arguments all of them. An environment whose pins have not changed since it was made is left as it is.
#   PYTHON=python3.12 benchmarks/peers/setup.sh [NAME …]
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "$python is $("$python" --version); 3.11 or newer is needed: name one with PYTHON=…" >&2
  exit 2
}
if [ $# -eq 0 ]; then
  for pins in benchmarks/peers/requirements-*.txt; do
    name=${pins##*/requirements-}
    set -- "$@" "${name%.txt}"
  done
fi
for name in "$@"; do
  pins=benchmarks/peers/requirements-$name.txt folder=.venv-peers/$name
  [ -f "$pins" ] || { echo "There is no $pins." >&2; exit 2; }
  if cmp -s "$pins" "$folder/.pins"; then
    continue
  fi
  echo "== making $folder"
  "$python" -m venv --clear "$folder"
  "$folder/bin/python" -m pip install --quiet --upgrade pip
  "$folder/bin/python" -m pip install --quiet --requirement "$pins"
  # A torchvision that pip brought along and that does not fit torch; transformers would import it.
  if "$folder/bin/python" -m pip show --quiet torchvision 2> /dev/null && ! "$folder/bin/python" -c 'import torchvision' 2> /dev/null; then
    "$folder/bin/python" -m pip uninstall --quiet --yes torchvision
  fi
  cp "$pins" "$folder/.pins" # last, so that an interrupted installation is made again
done
