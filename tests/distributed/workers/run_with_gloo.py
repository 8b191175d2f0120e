"""Run a script as if started by itself, with gloo for DeepSpeed on hosts without a device.

    accelerate launch run_with_gloo.py SCRIPT FLAGS...

diffusers' trainer names no backend, and DeepSpeed then asks for a device's own.
"""

import importlib.util
import os
import runpy
import sys

import accelerate
from accelerate.utils import InitProcessGroupKwargs

original = accelerate.Accelerator.__init__


def with_gloo(self, *args, **kwargs):
    kwargs["kwargs_handlers"] = [*(kwargs.get("kwargs_handlers") or []), InitProcessGroupKwargs(backend="gloo")]
    original(self, *args, **kwargs)


def main():
    accelerate.Accelerator.__init__ = with_gloo
    here = os.path.dirname(os.path.abspath(__file__))
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(sys.argv[0])
    # These look for torchvision themselves and must not find the stand-in.
    for name in ("diffusers", "transformers.image_utils"):
        importlib.import_module(name)
    if importlib.util.find_spec("torchvision") is None:
        sys.path.append(os.path.join(here, "stand_in"))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
