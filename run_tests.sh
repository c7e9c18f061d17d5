#!/usr/bin/env bash
# The style of the code, and the tests, on a CPU.    ./run_tests.sh [flags of pytest]
set -euo pipefail
requirements=(requirements-export.txt)  # the tests export, too
. "$(dirname "$0")/environment.sh"
cd "$here"
"$PYTHON" -m ruff check .
exec "$PYTHON" -m pytest -n 2 --dist worksteal "$@"
