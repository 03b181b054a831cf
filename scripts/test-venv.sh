# The environment of scripts/test and scripts/check; sourced after venv.sh.
#
# test_python prints the Python to use: the active environment's where it has pytest, otherwise that
# of .venv-test with everything that the tests and the type checker import.
# shellcheck shell=bash

: "${root:?}"

# NOTE: pinned, so that pip takes a CPU build where one is at hand: from a local wheel folder
# (PIP_FIND_LINKS), or with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu. Without either,
# PyPI serves Linux on x86-64 the CUDA build of the same version, which works too but takes some GB.
torch="torch==2.13.0"

test_python() {
  if [[ -n "${VIRTUAL_ENV:-}" ]] && "$VIRTUAL_ENV/bin/python" -c 'import pytest' 2>/dev/null; then
    printf '%s\n' "$VIRTUAL_ENV/bin/python"
    return
  fi
  make_venv "$root/.venv-test" "$torch" hatchling hatch-fancy-pypi-readme \
    -e "${root}[dev,chat,edge,torch,export,serve,client,mqtt,eval]" >&2 || return
  printf '%s\n' "$root/.venv-test/bin/python"
}
