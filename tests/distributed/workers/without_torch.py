"""Run a script (a path) or module (a dotted name) of the kit as `__main__`: what it imports must be light.

Started by tests: python tests/distributed/workers/without_torch.py PROGRAM [its arguments]
"""

import runpy
import sys

HEAVY = {"torch", "diffusers", "transformers", "peft", "numpy", "PIL", "jinja2", "tqdm"}

program = sys.argv[1]
sys.argv = sys.argv[1:]
code = 0
try:
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
except SystemExit as stop:
    code = stop.code or 0
if imported := HEAVY & set(sys.modules):
    sys.exit(f"imported {sorted(imported)}")
sys.exit(code)
