# Virtual environments of the scripts beside this file; sourced, not run.
#
# make_venv FOLDER PIP_ARGUMENTS... makes FOLDER with $PYTHON, otherwise with the newest Python found
# that is at least 3.11, and installs into it, unless a stamp says that pyproject.toml, the place and
# the arguments are those of the last time. It installs by uv where that can be had, otherwise by pip,
# says what it does on stderr, and shows pip's output only where pip fails.
#
# The calling script sets root, the folder of the checkout.
# shellcheck shell=bash

: "${root:?}"

# Images of containers like to forbid these files. Without them every process that a script starts
# compiles what it imports anew, and pip compiles nothing ahead here.
unset PYTHONDONTWRITEBYTECODE

say() {
  printf '%s\n' "$*" >&2
}

find_python() {
  local name
  for name in ${PYTHON:+"$PYTHON"} python3.14 python3.13 python3.12 python3.11 python3 python; do
    if command -v "$name" >/dev/null &&
      "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  say "error: d2f-stream needs Python 3.11 or newer, and none was found on the PATH;"
  say "install one (https://www.python.org/downloads/) and try again"
  return 1
}

# Runs a command quietly; shows what it printed only if it fails.
quietly() {
  local log status=0
  log="$(mktemp)"
  "$@" >"$log" 2>&1 || status=$?
  if ((status)); then
    tail -n 40 "$log" >&2
    say "error: '$*' failed with exit code $status; its last lines are above"
  fi
  rm -f "$log"
  return "$status"
}

# What pip is configured to use, a word a line; the environment's word comes before that of files.
pip_setting() {
  "$1/bin/python" -m pip config list 2>/dev/null | sed -n "s/^[^=]*[.:]$2='\(.*\)'$/\1/p" |
    head -n 1 | tr -s ' ' '\n'
}

# NOTE: uv does not read pip's configuration, so it is told, and takes the newest version of all indexes
# as pip does; whatever it cannot do is left to pip.
install_by_uv() {
  local venv="$1" setting word
  local -a options=(--python "$venv/bin/python" --index-strategy unsafe-best-match)
  shift
  "$venv/bin/python" -m pip install --disable-pip-version-check --quiet uv >/dev/null 2>&1 || return
  for setting in index-url extra-index-url find-links constraint; do
    for word in $(pip_setting "$venv" "$setting"); do
      options+=("--$setting" "$word")
    done
  done
  "$venv/bin/python" -m uv pip install --quiet "${options[@]}" "$@" >/dev/null 2>&1
}

make_venv() {
  local venv="$1" stamp python
  shift
  stamp="$(printf '%s ' "$root" "$@" | cat - "$root/pyproject.toml" | cksum)"
  if [[ -x "$venv/bin/python" && "$(cat "$venv/stamp" 2>/dev/null)" == "$stamp" ]] &&
    "$venv/bin/python" -c '' 2>/dev/null; then
    return
  fi
  python="$(find_python)" || return
  rm -f "$venv/stamp"
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    say "making ${venv##*/} with $("$python" --version)"
    quietly "$python" -m venv --clear "$venv" || return
  fi
  say "installing into ${venv##*/}; this happens once and may take some minutes"
  install_by_uv "$venv" "$@" ||
    quietly "$venv/bin/python" -m pip install --disable-pip-version-check --no-compile "$@" || return
  printf '%s\n' "$stamp" >"$venv/stamp"
}
