#!/usr/bin/env bash
# Run the suite, with all set-up: bash tests/run.sh [pytest arguments]
# Without arguments everything runs, the slow tests too; SANA_FAST=1 leaves those out. Two files of tests run at a time,
# since many wait for processes; SANA_TEST_WORKERS=0 runs all in one process, as `python -m pytest tests/...` does.
set -euo pipefail
kit=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$kit"

python=$("${PYTHON:-python3}" sana_kit/environment.py --tests)

# The report pages are tested in a real browser, where one is there or can be installed; those tests say so if not.
if ! command -v chromium >/dev/null && ! command -v google-chrome >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } \
    >/dev/null 2>&1 || echo "note: chromium could not be installed; the browser tests will be skipped" >&2
fi

bash tests/lint.sh "$python"
select=()
[ "${SANA_FAST:-0}" = 1 ] && select=(-m "not slow")
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$python" -m pytest -q --durations=15 -n "${SANA_TEST_WORKERS:-2}" --dist loadfile ${select[@]+"${select[@]}"} "$@" tests
