#!/usr/bin/env bash
# The test command: bash tests/run.sh [pytest arguments]. Makes its own environment on first use.
set -euo pipefail
cd "$(dirname "$0")/.."
. recipes/env.sh requirements-dev.txt
ruff check .
ruff format --check .
exec python -m pytest -q -n 2 --dist loadfile "${@:-tests}"  # two processes, a file at a time each
