#!/usr/bin/env bash
# Brings what the tests in this folder need from where this machine's apt and pip get their packages, into .devices/NAME:
#   aarch64   Debian's Python for arm64 with the three packages that a bundle needs, and qemu, which runs it: .devices/aarch64/python
#   cpp       headers of ONNX Runtime and of nlohmann/json: .devices/cpp/include
# Needs apt, of Debian 12 or newer. Everything is unpacked there and nothing installed: apt works on folders of its own, and the
# machine's dpkg does not hear of arm64. What has been made by this script as it is, from the same pins, is left as it is.
#   PYTHON=.venv/bin/python bash tests/devices/setup.sh aarch64 cpp
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
[ $# -gt 0 ] || { echo "Name what to bring: aarch64, cpp." >&2; exit 2; }
command -v apt-get > /dev/null && command -v dpkg-deb > /dev/null || { echo "apt-get and dpkg-deb are needed: this runs on Debian and its kin." >&2; exit 2; }

private_apt() { # FOLDER ARCHITECTURE apt-get's arguments: as on a machine of that architecture where nothing is installed
  local folder=$1 architecture=$2
  mkdir -p "$folder/lists/partial" "$folder/cache/archives/partial"
  touch "$folder/status"
  apt-get --quiet=2 -o "Dir::State=$folder" -o "Dir::State::status=$folder/status" -o "Dir::Cache=$folder/cache" \
    -o "APT::Architecture=$architecture" -o "APT::Architectures=$architecture" -o APT::Sandbox::User=root \
    -o Acquire::Languages=none "${@:3}" > /dev/null
}

unpack() { # FOLDER FILE.deb […]
  local package
  for package in "${@:2}"; do
    dpkg-deb --extract "$package" "$1"
  done
}

bring_aarch64() { # FOLDER
  private_apt "$1/apt" arm64 update
  private_apt "$1/apt" arm64 install --yes --no-install-recommends --download-only python3-minimal libpython3-stdlib libstdc++6
  mkdir "$1/root"
  unpack "$1/root" "$1"/apt/cache/archives/*.deb
  [ -e "$1/root/lib" ] || ln -s usr/lib "$1/root/lib" # which newer releases leave to the package base-files
  local version qemu
  version=$(basename "$(readlink -f "$1/root/usr/bin/python3")")

  qemu=$(command -v qemu-aarch64 || command -v qemu-aarch64-static || true)
  if [ -z "$qemu" ]; then
    private_apt "$1/apt-here" "$(dpkg --print-architecture)" update
    private_apt "$1/apt-here" "$(dpkg --print-architecture)" install --yes --no-install-recommends --download-only qemu-user-static
    unpack "$1/apt-here/root" "$1"/apt-here/cache/archives/qemu-*.deb
    qemu=$(PATH=$1/apt-here/root/usr/bin; command -v qemu-aarch64 || command -v qemu-aarch64-static)
  fi
  cp "$qemu" "$1/qemu-aarch64"

  "$python" -m pip install --quiet --disable-pip-version-check --target "$1/packages" --no-deps --constraint constraints.txt \
    --only-binary=:all: --python-version "${version#python}" --implementation cp \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 \
    onnxruntime numpy tokenizers

  # onnxruntime breaks down on an x86's /proc/cpuinfo; qemu shows it the files of root/ before the machine's. A Cortex-A72, which
  # has none of the newer instructions, so that those are used that the emulated processor reports by itself.
  mkdir "$1/root/proc"
  local core
  for core in $(seq 0 $(($(nproc) - 1))); do
    printf '%s\n' "processor : $core" 'CPU implementer : 0x41' 'CPU architecture : 8' 'CPU variant : 0x0' 'CPU part : 0xd08' 'CPU revision : 3' ''
  done > "$1/root/proc/cpuinfo"

  cat > "$1/python" << WRAPPER
#!/bin/sh
# Python for arm64, under qemu. QEMU_CPU names the processor: cortex-a76 is a Raspberry Pi 5's.
here=\$(dirname "\$(readlink -f "\$0")")
QEMU_CPU=\${QEMU_CPU:-cortex-a76} PYTHONPATH=\$here/packages exec "\$here/qemu-aarch64" -L "\$here/root" "\$here/root/usr/bin/$version" "\$@"
WRAPPER
  chmod +x "$1/python"
  "$1/python" -c 'import numpy, onnxruntime, tokenizers' # also writes the standard library's bytecode
}

bring_cpp() { # FOLDER
  local site
  site=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 'Label: Debian' | head -1)
  mkdir -p "$1/apt"
  # Debian 13 is the first release with these headers; a program that is compiled with them runs with every newer library.
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $site trixie main" > "$1/apt/sources.list"
  local apt=(private_apt "$1/apt" "$(dpkg --print-architecture)" -o "Dir::Etc::sourcelist=$1/apt/sources.list" -o Dir::Etc::sourceparts=-)
  "${apt[@]}" update
  (cd "$1/apt" && "${apt[@]}" download libonnxruntime-dev nlohmann-json3-dev)
  unpack "$1/root" "$1"/apt/*.deb
  mkdir "$1/include"
  cp -r "$1/root/usr/include/onnxruntime/." "$1/root/usr/include/nlohmann" "$1/include"
}

for name in "$@"; do
  case $name in aarch64 | cpp) ;; *) echo "There is no $name: aarch64, cpp." >&2; exit 2 ;; esac
  folder=$PWD/.devices/$name
  if cat tests/devices/setup.sh constraints.txt | cmp -s - "$folder/made-by"; then
    continue
  fi
  echo "== making $folder"
  rm -rf "$folder"
  mkdir -p "$folder"
  "bring_$name" "$folder"
  rm -rf "$folder"/apt "$folder"/apt-here
  cat tests/devices/setup.sh constraints.txt > "$folder/made-by" # last, so that an interrupted download is made again
done
