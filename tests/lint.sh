#!/usr/bin/env bash
# The checks of the source, each by its own tool: bash tests/lint.sh [PYTHON]. tests/run.sh runs them before the suite.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${1:-python3}
tools=$("$python" -c "import sysconfig; print(sysconfig.get_path('scripts'))")

"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy --config-file .mypy.ini --cache-dir .mypy_cache
PYTHONPATH=. "$tools/lint-imports" --no-logo --no-cache
"$tools/codespell"
"$tools/shellcheck" -e SC2086,SC2317,SC2329 ./*.sh tests/*.sh tests/*/*.sh docs/*.sh .ci/run
