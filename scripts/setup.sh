#!/usr/bin/env bash
# Make the virtual environment: the locked packages, the build of torch that suits this machine, llmprune itself.
#   TORCH=cpu|gpu   choose the build (default: gpu where nvidia-smi lists a card, cpu elsewhere)
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}

fail() { printf '%s\n' "$*" >&2; exit 1; }

"$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' ||
  fail "llmprune needs Python 3.11-3.13, '$PYTHON' is $("$PYTHON" -V 2>&1). Set PYTHON=/path/to/python3.12."
if [ ! -x "$VENV/bin/pip" ]; then
  echo "Making $VENV"
  "$PYTHON" -m venv "$VENV" || fail "Python's venv module is incomplete: on Debian, 'apt install python3-venv'."
fi
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

torch_pin=$(grep -E '^torch==' requirements.lock)
has_torch() { "$VENV/bin/python" -c "import importlib.metadata as m, sys; sys.exit(m.version('torch').split('+')[0] != '${torch_pin#torch==}')" 2>/dev/null; }
if ! has_torch; then
  if [ -z "${TORCH:-}" ]; then
    if nvidia-smi -L >/dev/null 2>&1; then TORCH=gpu; else TORCH=cpu; fi
  fi
  echo "Installing $torch_pin ($TORCH build)"
  if [ "$TORCH" = cpu ] && [ "$(uname -s)" = Linux ]; then
    # A file named "+cpu" from pip's own sources if there is one, else PyTorch's CPU index: never the CUDA packages.
    pip install "$torch_pin+cpu" 2>/dev/null || pip install "$torch_pin" --index-url https://download.pytorch.org/whl/cpu
  else
    pip install "$torch_pin"
  fi
fi
echo "Installing the locked packages"
grep -vE '^torch==' requirements.lock > "$VENV/requirements.txt"
pip install -r "$VENV/requirements.txt"
pip install --no-deps --no-build-isolation -e .
