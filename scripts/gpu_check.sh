#!/usr/bin/env bash
# Runs on a GPU what needs one, and reports what works and how fast. Options: scripts/gpu_check.sh --help
set -euo pipefail
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh test,inference
root=$PWD
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
# A file named with --output is meant from where the command was given.
cd "$called_from"
exec "$PYTHON" "$root/benchmarks/gpu_check.py" "$@"
