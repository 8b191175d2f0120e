"""The tensors of a checkpoint, read by one rank for all; what they are and where they go is checkpoints.py's."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open

from sana_kit.errors import CheckpointError
from sana_kit.files import read_header
from sana_kit.training.engine import Engine
from sana_kit.training.shares import DTYPES
from sana_kit.training.zero import whole_shape

OPTIMIZER_STEM = "optimizer"
RANDOM_FILE = "random_states.pt"


class CheckpointReader:
    """A checkpoint's tensors, read by the main rank and passed on to all, one at a time."""

    def __init__(self, folder: Path, engine: Engine, open_files: ExitStack, stem: str = OPTIMIZER_STEM):
        self._kind = "master" if stem == OPTIMIZER_STEM else stem
        self._folder, self._engine, self._handles = folder, engine, {}
        described = {}
        if engine.ranks.is_main:
            for path in sorted(folder.glob(f"{stem}*.safetensors")):
                handle = open_files.enter_context(safe_open(path, framework="pt"))
                self._handles.update(dict.fromkeys(handle.keys(), handle))
                described.update({key: (shape, DTYPES[name]) for key, (name, shape) in read_header(path)[0].items()})
        # {key: (shape, dtype)} on every rank
        self.tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = engine.ranks.agree(described)

    def check(self, named_parameters: list[tuple[str, torch.nn.Parameter]]) -> None:
        """CheckpointError unless the file's masters (or averages) are those of these parameters."""
        expected = {f"{name}|{self._kind}": whole_shape(p) for name, p in named_parameters}
        found = {key: shape for key, (shape, _) in self.tensors.items() if key.endswith(f"|{self._kind}")}
        if expected == found:
            return
        missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
        other = [
            f"{k}: {found[k]} instead of {expected[k]}" for k in expected if k in found and found[k] != expected[k]
        ]
        raise CheckpointError(
            "The checkpoint does not fit this model (another --rank, --lora_layers, --train_mode or base model):"
            f" missing {missing[:3]} ({len(missing)}), unexpected {extra[:3]} ({len(extra)}),"
            f" other shapes {other[:3]} ({len(other)})."
        )

    def read(self, key: str) -> torch.Tensor:
        """One tensor, the same on every rank."""
        shape, dtype = self.tensors[key]
        if self._engine.ranks.is_main:
            tensor = self._handles[key].get_tensor(key)
        else:
            tensor = torch.empty(shape, dtype=dtype)
        if self._engine.ranks.world_size > 1:
            tensor = tensor.to(self._engine.device)
            torch.distributed.broadcast(tensor, src=0)
        return tensor

    def random_states(self) -> dict | None:
        """random_states.pt, on the main rank."""
        if not self._engine.ranks.is_main:
            return None
        return torch.load(self._folder / RANDOM_FILE, map_location="cpu", weights_only=True)
