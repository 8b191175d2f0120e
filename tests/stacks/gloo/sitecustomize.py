"""For stacks whose gloo lacks bf16 and all_gather_into_tensor (torch 2.1): both, as NCCL and HCCL have them.

Python imports this file by itself where tests/stacks/run.sh has put its folder on PYTHONPATH; it does nothing unless
`lacking()` says so. Below the engines it stands in for the device's collectives: what is moved goes as bytes, what is
summed goes as float32. Above it run the real DeepSpeed and DDP.

    PYTHONPATH=tests/stacks/gloo python -c "import sitecustomize; print(sitecustomize.lacking())"
"""

import functools
from datetime import timedelta

import torch
import torch.distributed as dist


def lacking() -> list[str]:
    """What this torch's gloo cannot do, of "bf16" and "all_gather_into_tensor"."""
    group = dist.ProcessGroupGloo(dist.HashStore(), 0, 1, timedelta(seconds=20))
    one = torch.ones(2)
    tries = {
        "bf16": lambda: group.broadcast(one.bfloat16(), 0).wait(),
        "all_gather_into_tensor": lambda: group._allgather_base(one.clone(), one).wait(),
    }
    missing = []
    for name, attempt in tries.items():
        try:
            attempt()
        except RuntimeError:
            missing.append(name)
    return missing


class _Done:
    """The handle of a collective that is over."""

    def wait(self, timeout=None):
        return True


def _raw(tensor):
    """The bytes of a contiguous bf16 tensor, sharing its memory; other tensors as they are."""
    return tensor.reshape(-1).view(torch.uint8) if tensor.dtype == torch.bfloat16 else tensor


def _moved(function):
    """broadcast and the like: the bytes move."""

    @functools.wraps(function)
    def call(tensor, *args, **kwargs):
        if tensor.dtype != torch.bfloat16:
            return function(tensor, *args, **kwargs)
        held = tensor.contiguous()
        handle = function(_raw(held), *args, **{**kwargs, "async_op": False})
        if held is not tensor:
            tensor.copy_(held)
        return _Done() if kwargs.get("async_op") else handle

    return call


def _summed(function):
    """all_reduce and reduce: float32 takes part in bf16's place."""

    @functools.wraps(function)
    def call(tensor, *args, **kwargs):
        if tensor.dtype != torch.bfloat16:
            return function(tensor, *args, **kwargs)
        wide = tensor.float()
        handle = function(wide, *args, **{**kwargs, "async_op": False})
        tensor.copy_(wide)
        return _Done() if kwargs.get("async_op") else handle

    return call


def _all_gather_into_tensor(output_tensor, input_tensor, group=None, async_op=False):
    size = dist.get_world_size(group)
    parts = [torch.empty_like(_raw(input_tensor.contiguous())) for _ in range(size)]
    dist.all_gather(parts, _raw(input_tensor.contiguous()), group=group)
    joined = torch.cat([part.reshape(-1) for part in parts])
    output_tensor.copy_(joined.view(output_tensor.dtype).view_as(output_tensor))
    return _Done() if async_op else None


def _broadcast_coalesced(function):
    """DDP's first synchronisation of weights and buffers, frozen bf16 ones too."""

    @functools.wraps(function)
    def call(group, tensors, *args):
        return function(group, [_raw(tensor) for tensor in tensors], *args)

    return call


def _install():
    dist.broadcast = _moved(dist.broadcast)
    dist.all_reduce, dist.reduce = _summed(dist.all_reduce), _summed(dist.reduce)
    dist.all_gather_into_tensor = _all_gather_into_tensor
    dist._broadcast_coalesced = _broadcast_coalesced(dist._broadcast_coalesced)


if lacking():
    _install()
