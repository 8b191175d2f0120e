"""CUDA graphs of a whole transformer, by torch's compiler: one launch for a pass of a thousand kernels.

Nothing of it has run on a card yet; what is tested is that the whole forward and backward pass is one graph to the
compiler, for every member of the family, with the numbers of the plain one (tests/integration/test_graphs.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sana_kit.devices import kind_of
from sana_kit.errors import Problem

FIELD = "cuda_graphs"


def device_problems(device: torch.device | str) -> list[Problem]:
    """Why there are no graphs on a device."""
    kind = kind_of(device)
    if kind.graphs:
        return []
    return [
        Problem(
            FIELD, None, f"CUDA graphs are recorded on CUDA devices only, and this is {kind.name}", "Leave it out."
        )
    ]


def record_graphs(transformer: torch.nn.Module, training: bool) -> None:
    """Let the transformer's passes be recorded, a graph for each shape of its inputs, and played from then on.

    Args:
        training: whether passes in training mode are recorded, forward and backward (validation in between is not), or
            those in eval mode, forward only. The parameters must stay where they are once the first pass was made.
    """
    plain: Callable[..., Any] = transformer.forward
    graphed = torch.compile(plain, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if transformer.training != training:
            return plain(*args, **kwargs)
        torch.compiler.cudagraph_mark_step_begin()  # what an earlier pass left in the graph's memory may go
        outputs = graphed(*args, **kwargs)
        # a scheduler keeps predictions for its later steps
        return outputs if training else tuple(output.clone() for output in outputs)

    transformer.forward = forward  # type: ignore[method-assign]
