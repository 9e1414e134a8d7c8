# Finds or makes the Python environment; sourced by the launcher and the tests, from the project's root.
#
#   . scripts/environment.sh EXTRAS       EXTRAS: of pyproject.toml, separated by commas; '' for training alone
#
# Sets PYTHON. The active environment is used when it has what pyproject.toml asks for (conda, containers, clusters).
# Otherwise .venv is used. Where there is none, pip fills it from the pinned versions of constraints.txt, ready for
# predict and evaluate too. Later, pip runs only when a requirement is missing or the requirements have changed.
# shellcheck shell=bash

# In an environment filled by this script: the fingerprint of the requirements, or "unfinished" until the first filling
# is complete.
orion_stamp=.venv/orion.stamp

orion_environment() {
  local extras=$1 candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python; do
    if command -v "$candidate" >/dev/null 2>&1 && "$candidate" scripts/check_requirements.py "$extras" 2>/dev/null; then
      PYTHON=$(command -v "$candidate")
      return 0
    fi
  done
  if ! orion_venv_is_ready "$extras"; then
    # Two launchers on one file system must not fill the same folder.
    (
      if command -v flock >/dev/null 2>&1; then flock 9; fi
      orion_venv_is_ready "$extras" || orion_fill_venv "$extras"
    ) 9>.venv.lock || return $?
  fi
  PYTHON=$PWD/.venv/bin/python
}

orion_venv_is_ready() {
  .venv/bin/python scripts/check_requirements.py --stamp "$orion_stamp" "$1" >/dev/null 2>&1
}

orion_fill_venv() {
  local extras=$1 unfinished='' reason
  if [ "$(cat "$orion_stamp" 2>/dev/null)" = unfinished ]; then unfinished=yes; fi
  if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
    if [ -n "$unfinished" ]; then
      rm -rf .venv
    elif [ -e .venv ] || [ -L .venv ]; then
      echo "error: .venv has no working Python 3.11 or newer; remove it (rm -r .venv) and call again, or name another Python with PYTHON=/path/to/python" >&2
      return 2
    fi
    orion_make_venv || return $?
    unfinished=yes
  fi
  if [ -n "$unfinished" ]; then
    echo "making the Python environment .venv (once; needs the network, and a few minutes where torch must be downloaded)" >&2
  else
    reason=$(.venv/bin/python scripts/check_requirements.py --stamp "$orion_stamp" "$extras" 2>&1)
    echo "updating the Python environment .venv ($reason)" >&2
  fi
  # The pins apply to what builds the package, too.
  if PIP_CONSTRAINT=$PWD/constraints.txt .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --editable ".[inference${extras:+,$extras}]"; then
    .venv/bin/python scripts/check_requirements.py --fingerprint >"$orion_stamp"
    echo "environment ready in .venv" >&2
  elif .venv/bin/python scripts/check_requirements.py "$extras" 2>/dev/null; then
    echo "warning: .venv could not be updated (see above); it has what is needed and is used as it is, and the next call tries again" >&2
  else
    echo "error: the environment could not be made (see above); the next call tries again" >&2
    return 1
  fi
}

# An empty .venv, marked as unfinished before anything is in it.
orion_make_venv() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      mkdir .venv && echo unfinished >"$orion_stamp" && "$candidate" -m venv .venv || return 1
      return 0
    fi
  done
  echo "error: no Python 3.11 or newer with venv and pip was found; install one, or name it with PYTHON=/path/to/python" >&2
  return 2
}

orion_environment "${1:-}"
