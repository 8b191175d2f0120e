#!/usr/bin/env bash
# Run a command on an emulated Ascend host: the real torch_npu over a stand-in CANN runtime (README.md beside this file).
#   bash tests/ascend/run.sh [command ...]        without a command: pytest on tests/ascend/test_ascend.py
#   ASCEND_EMULATED_DEVICES=4 bash tests/ascend/run.sh python -m sana_kit.doctor
# Ends with the command's code, or with 77 and a reason where the host cannot be built.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)

if [ -n "${PYTHON:-}" ]; then python=$PYTHON
elif [ -n "${VIRTUAL_ENV:-}" ]; then python=$VIRTUAL_ENV/bin/python
elif [ -x "$root/.venv/bin/python" ]; then python=$root/.venv/bin/python
else python=python3
fi

if [ $# -eq 0 ]; then exec "$python" -m pytest -q "$root/tests/ascend/test_ascend.py"; fi

variables=$("$python" "$here/build_host.py") || exit $?
while IFS= read -r line; do export "${line?}"; done <<<"$variables"
export ASCEND_EMULATED_DEVICES=${ASCEND_EMULATED_DEVICES:-2}
PATH=$(dirname "$("$python" -c 'import sys; print(sys.executable)')"):$PATH  # so that "python" is the one it was built for
export PATH
exec "$@"
