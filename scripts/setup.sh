#!/usr/bin/env bash
# Make the virtual environment: the locked packages, the build of torch that suits this machine, llmprune itself.
#   setup.sh [packages|llmprune]   only that step (default: both); the Dockerfile makes one image layer of each
#   TORCH=cpu|gpu          choose the build (default: gpu where nvidia-smi lists a card, cpu elsewhere)
#   PARTS=all|worker|web   all (default): to work on this checkout, with tests and linters, llmprune editable;
#                          worker, web: what that container image runs, llmprune installed; web has no torch
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
PARTS=${PARTS:-all}

fail() { printf '%s\n' "$*" >&2; exit 1; }
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

case $PARTS in
  all) lock=requirements.lock editable=yes ;;
  worker | web) lock=requirements-$PARTS.lock editable= ;;
  *) fail "PARTS is all, worker or web, not '$PARTS'." ;;
esac
case ${TORCH:-} in
  "" | cpu | gpu) ;;
  *) fail "TORCH is cpu or gpu, not '$TORCH'." ;;
esac

make_venv() {
  "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' ||
    fail "llmprune needs Python 3.11-3.13, '$PYTHON' is $("$PYTHON" -V 2>&1). Set PYTHON=/path/to/python3.12."
  if [ ! -x "$VENV/bin/pip" ]; then
    echo "Making $VENV"
    "$PYTHON" -m venv "$VENV" || fail "Python's venv module is incomplete: on Debian, 'apt install python3-venv'."
  fi
}

has_torch() {
  "$VENV/bin/python" -c "import importlib.metadata as m, sys; sys.exit(m.version('torch').split('+')[0] != '$1')" 2>/dev/null
}

install_torch() { # torch==VERSION
  if [ -z "${TORCH:-}" ]; then
    if nvidia-smi -L >/dev/null 2>&1; then TORCH=gpu; else TORCH=cpu; fi
  fi
  echo "Installing $1 ($TORCH build)"
  if [ "$TORCH" = cpu ] && [ "$(uname -s)" = Linux ]; then
    # A file named "+cpu" from pip's own sources if there is one, else PyTorch's CPU index: never the CUDA packages.
    pip install "$1+cpu" 2>/dev/null || pip install "$1" --index-url https://download.pytorch.org/whl/cpu
  else
    pip install "$1"
  fi
}

install_packages() {
  make_venv
  torch_pin=$(grep -E '^torch==' "$lock") || torch_pin=
  if [ -n "$torch_pin" ] && ! has_torch "${torch_pin#torch==}"; then install_torch "$torch_pin"; fi
  echo "Installing the locked packages"
  grep -vE '^torch==' "$lock" > "$VENV/requirements.txt"
  pip install -r "$VENV/requirements.txt"
}

install_llmprune() {
  pip install --no-deps --no-build-isolation ${editable:+--editable} .
}

case ${1:-} in
  packages | llmprune) "install_$1" ;;
  "") install_packages && install_llmprune ;;
  *) fail "A step is packages or llmprune, not '$1'." ;;
esac
