"""Safetensors files whose bytes depend on their content alone."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
import torch

from sana_kit.files import apply_umask, write_atomic


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Path:
    """Write one safetensors file, whole or not at all; equal input gives equal bytes.

    safetensors writes the metadata in the random order of a hash map: it is sorted here.
    """
    data = safetensors.torch.save(
        {name: t.contiguous() for name, t in tensors.items()}, metadata=dict(metadata) or None
    )
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(file: BinaryIO) -> None:
        for piece in (struct.pack("<Q", len(text)), text, memoryview(data)[8 + length :]):
            file.write(piece)

    write_atomic(path, write)
    apply_umask([path])
    return path
