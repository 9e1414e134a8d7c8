#!/usr/bin/env bash
# Lint, type check and every test, in an environment made on first use. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh test,inference,tensorboard

scripts/lint.sh
exec "$PYTHON" -m pytest "$@"
