#!/usr/bin/env bash
# The test command: bash tests/run.sh [pytest arguments]. Makes its own environment on first use.
set -euo pipefail
cd "$(dirname "$0")/.."
. recipes/env.sh requirements-dev.txt
ruff check .
ruff format --check .
# on two cores three processes, a file at a time each: tests wait for what they start
exec python -m pytest -q -n 3 --dist loadfile "${@:-tests}"
