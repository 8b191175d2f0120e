#!/usr/bin/env bash
# Run the suite's core on another stack of versions, in an environment of its own:
#
#     bash tests/stacks/run.sh current|middle|reference [pytest arguments]
#
# NAME.txt beside this file pins the versions. The environment is made in .venv-NAME beside it, or in the folder that
# SANA_STACK_VENV names; 3 to 8 GB where the index has CUDA builds only. PYTHON chooses the interpreter: 3.10 to 3.12,
# for `reference` 3.10 or 3.11. pytest arguments replace nothing: they are added, e.g. -x, -k or another file.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
kit=$(cd "$here/../.." && pwd)
name=${1:-}
if [ -z "$name" ] || [ ! -f "$here/$name.txt" ]; then
  echo "usage: bash tests/stacks/run.sh NAME [pytest arguments]; NAME is one of:" "$(cd "$here" && echo *.txt | sed 's/\.txt//g')" >&2
  exit 2
fi
shift
cd "$kit"
venv=${SANA_STACK_VENV:-$here/.venv-$name}
pins=$here/$name.txt
[ "$name" = current ] && pins=$kit/sana_kit/constraints.txt

# 0 where every pinned version is the installed one; says what is not.
as_pinned() {
  "$venv/bin/python" - "$kit" "$pins" <<'PY'
import sys
from pathlib import Path

sys.path.insert(0, f"{sys.argv[1]}/sana_kit")
from environment import read_requirements, unmet

kit = Path(sys.argv[1])
wanted = read_requirements(Path(sys.argv[2])) + read_requirements(kit / "requirements_sana.txt")
lacking = unmet(wanted + [("pytest", ""), ("pytest-timeout", ""), ("psutil", "")])
if lacking:
    sys.exit("; ".join(lacking))
PY
}

if [ ! -x "$venv/bin/python" ]; then
  "${PYTHON:-python3}" -m venv "$venv"
fi
if ! as_pinned; then
  pip=("$venv/bin/python" -m pip install --disable-pip-version-check -q -c "$here/$name.txt")
  "${pip[@]}" torch numpy setuptools wheel
  # DeepSpeed is a source package that imports torch while it is built.
  "${pip[@]}" --no-build-isolation deepspeed
  "${pip[@]}" -r requirements_sana.txt pytest pytest-timeout psutil
  as_pinned
fi
"$venv/bin/python" - "$pins" <<'PY'
import importlib.metadata as metadata
import platform
import re
import sys

names = re.findall(r"^([A-Za-z0-9_.-]+)==", open(sys.argv[1]).read(), flags=re.M)
print(f"Python {platform.python_version()},", ", ".join(f"{name} {metadata.version(name)}" for name in names))
PY

core=(
  tests/unit/training/test_recipes.py tests/unit/data tests/unit/encodings tests/integration/test_train.py
  tests/unit/generation tests/unit/inference tests/unit/test_patch_sana.py tests/integration/test_inference.py
  tests/distributed/test_shared_work.py
  tests/distributed/test_engines.py::test_zero2_resumes_to_the_bit
  tests/distributed/test_engines.py::test_zero2_keeps_float32_masters_of_its_bf16_adapter
  tests/distributed/test_engines.py::test_a_zero2_checkpoint_resumes_on_other_processes_and_engines
)
# torch 2.1's gloo lacks what the engines need and a device's collectives have: gloo/ adds it there, and only there.
SANA_STACK_PATH=$here/gloo
lacking=$(PYTHONPATH=$SANA_STACK_PATH "$venv/bin/python" -c "import sitecustomize as s; print(*s.lacking(), sep=', ')")
if [ -n "$lacking" ]; then
  echo "this torch's gloo lacks $lacking: processes that the tests launch get it from tests/stacks/gloo"
  export SANA_STACK_PATH
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
# -rs: what a stack cannot run is skipped with its reason, which belongs in the report.
exec "$venv/bin/python" -m pytest -q -rs --durations=5 -m "not slow" "${core[@]}" "$@"
