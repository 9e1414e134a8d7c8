#!/usr/bin/env bash
# Lint, type check and every test, in an environment made on first use. Arguments go to pytest:
#
#   scripts/test.sh -m "not slow"      without the trainings, commands and benchmarks that take several seconds
#   scripts/test.sh -n 0 tests/unit    in one process instead of side by side
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh test,inference,tensorboard

scripts/lint.sh
# Whole files side by side, so that fixtures of a file are made once; in the order of the files, long ones first.
exec "$PYTHON" -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
