"""Loaded by Python itself on the emulated Ascend host: puts CPU kernels under torch_npu as soon as it is imported.

run.sh lays this folder on PYTHONPATH. No script is told anything: whoever imports torch or torch_npu gets the kernels.
A sitecustomize that this one hides is run as well.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys


class _AfterTorchNpu(importlib.abc.MetaPathFinder):
    """Finds torch_npu as usual and adds one step after its module has run."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch_npu":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            import emulated_kernels

            emulated_kernels.install()

        spec.loader.exec_module = exec_module
        return spec


def _run_hidden_sitecustomize():
    here = os.path.dirname(os.path.abspath(__file__))
    elsewhere = [folder for folder in sys.path if os.path.abspath(folder or ".") != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


sys.meta_path.insert(0, _AfterTorchNpu())
_run_hidden_sitecustomize()
