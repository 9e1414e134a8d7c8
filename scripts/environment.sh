# Finds or makes the Python environment; sourced by the launcher and the tests, from the project's root.
#
#   . scripts/environment.sh EXTRAS       EXTRAS: of pyproject.toml, separated by commas; '' for training alone
#
# Sets PYTHON. The active environment is used when it already holds what pyproject.toml asks for (conda, containers,
# clusters); else .venv is made with pip, once, from the pinned versions of constraints.txt, ready for predict and
# evaluate too.
# shellcheck shell=bash

orion_environment() {
  local extra=${1:-} candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python; do
    if command -v "$candidate" >/dev/null 2>&1 && "$candidate" scripts/check_requirements.py ${extra:+"$extra"} 2>/dev/null; then
      PYTHON=$(command -v "$candidate")
      return 0
    fi
  done

  local stamp=.venv/orion_${extra:-run}.stamp
  if orion_venv_is_whole "$stamp"; then
    PYTHON=$PWD/.venv/bin/python
    return 0
  fi
  # Two launchers on one file system must not fill the same folder.
  if command -v flock >/dev/null 2>&1; then
    exec 9>.venv.lock
    flock 9
  fi
  if ! orion_venv_is_whole "$stamp"; then
    orion_make_venv "$extra" "$stamp" || return $?
  fi
  if command -v flock >/dev/null 2>&1; then
    exec 9>&-
  fi
  PYTHON=$PWD/.venv/bin/python
}

# What the environment was made from, so that a new requirement makes it anew.
orion_fingerprint() {
  cksum pyproject.toml constraints.txt
}

orion_venv_is_whole() {
  [ -x .venv/bin/python ] && [ -f "$1" ] && [ "$(cat "$1")" = "$(orion_fingerprint)" ]
}

orion_make_venv() {
  local extra=$1 stamp=$2 base='' candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      base=$candidate
      break
    fi
  done
  if [ -z "$base" ]; then
    echo "error: no Python 3.11 or newer with venv and pip was found; install one, or name it with PYTHON=/path/to/python" >&2
    return 2
  fi
  echo "making the Python environment .venv (once; needs the network, and a few minutes where torch must be downloaded)" >&2
  if ! .venv/bin/python -c '' >/dev/null 2>&1; then
    rm -rf .venv
    "$base" -m venv .venv || return 1
  fi
  # The pins hold for what builds the package, too.
  PIP_CONSTRAINT=$PWD/constraints.txt .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --editable ".[inference${extra:+,$extra}]" || {
    echo "error: the environment could not be made (see above); the next call tries again" >&2
    return 1
  }
  orion_fingerprint >"$stamp"
  echo "environment ready in .venv" >&2
}

orion_environment "${1:-}"
