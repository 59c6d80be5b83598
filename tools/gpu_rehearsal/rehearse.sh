#!/usr/bin/env bash
# docs/install.md's commands for a GPU node, and what of the GPU path runs without a driver:
# bash tools/gpu_rehearsal/rehearse.sh FOLDER PYTHON3.12. 11 GB, about half an hour; an environment that is there is used again.
# Prints one JSON object a check, and writes them into docs/gpu_rehearsal.md; exit code 1 where one failed.
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
folder="$1" python="$2"
mkdir -p "$folder" && folder="$(cd "$folder" && pwd)"
cd "$root"

if [ ! -e "$folder/.installed" ]; then
    # The rehearsal is not about speed, and Transformer Engine's build appends -O3 to what it is told.
    mkdir -p "$folder/compilers"
    for name in c++ g++; do
        printf '#!/bin/sh\nexec %s "$@" -O0\n' "$(command -v $name)" > "$folder/compilers/$name"
        chmod +x "$folder/compilers/$name"
    done
    export NVTE_BUILD_USE_NVIDIA_WHEELS=1 MAX_JOBS="${MAX_JOBS:-1}" PIP_NO_CACHE_DIR=1
    "$python" -m venv "$folder/venv"
    . "$folder/venv/bin/activate"
    step() { local start=$SECONDS; "$@" > "$folder/pip.log" 2>&1 || { tail -30 "$folder/pip.log"; exit 1; }
        echo "# $((SECONDS - start)) s, $(du -sm "$folder/venv" | cut -f1) MiB in all: $*"; }
    step pip install torch==2.14.1 setuptools wheel packaging ninja
    step pip install --editable '.[dev,sglang]'
    PATH="$folder/compilers:$PATH" step pip install --no-build-isolation --editable '.[dev,sglang,gpu]'
    step pip check
    touch "$folder/.installed"
fi

venv="$folder/venv/bin/python"
"$venv" tools/gpu_rehearsal/stand_in_driver.py "$("$venv" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
    "$folder/driver" > "$folder/driver.log"
export PYTHONPATH="$root"
: > "$folder/findings.jsonl"
"$venv" -m tools.gpu_rehearsal.checks no-libcuda 2> "$folder/checks.log" | tee -a "$folder/findings.jsonl"
for group in imports models arguments environment payloads requests kernels devices; do
    LD_LIBRARY_PATH="$folder/driver" "$venv" -m tools.gpu_rehearsal.checks "$group" 2>> "$folder/checks.log" |
        tee -a "$folder/findings.jsonl"
done
"$venv" -m tools.gpu_rehearsal.report "$folder/findings.jsonl" docs/gpu_rehearsal.md
if grep '"status": "FAIL"' "$folder/findings.jsonl"; then exit 1; fi
