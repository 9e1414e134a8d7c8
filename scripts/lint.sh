#!/usr/bin/env bash
# Lint and type check; run by the tests, and by pre-commit.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh test,inference,tensorboard

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
"$(dirname "$PYTHON")/shellcheck" train_stable_learning.sh scripts/*.sh scripts/*.sbatch .ci/run
