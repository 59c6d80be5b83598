#!/usr/bin/env bash
# A virtual environment in which an unmodified SGLang serves on a machine without a GPU (Linux x86-64, glibc 2.34 or
# newer, Python 3.11): bash tools/sglang_cpu/install.sh [FOLDER] [PYTHON]. 1.7 GB, one to two minutes.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
venv="${1:-.venv-sglang}"
python="$(command -v "${2:-python3.11}" || command -v python3)"

# Two that install at once would mix their files; the second finds it done.
exec 9> "$venv.lock"
flock 9
if [ -e "$venv/.installed" ] && [ -z "$(find "$here" -type f -newer "$venv/.installed" -not -path '*/__pycache__/*')" ]; then
    exit 0
fi
"$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
packages="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

pip --requirement "$here/requirements.txt"
# Their metadata asks for the CUDA stack, which nothing here uses.
pip --no-deps sglang==0.5.23 xgrammar==0.2.7
rm -rf "$packages/torchvision_without_operators"
pip --no-deps --target "$packages/torchvision_without_operators" torchvision==0.28.0
cp -R "$here"/stand_ins/* "$packages"
"$venv/bin/python" -c 'import sglang.srt.server_args' > /dev/null
touch "$venv/.installed"
