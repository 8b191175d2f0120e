"""Every collective that accelerate, DeepSpeed and DDP use, through torch_npu's ProcessGroupHCCL.

Run by tests/ascend/test_ascend.py; by hand:
    bash tests/ascend/run.sh torchrun --nproc_per_node 2 tests/ascend/collective_checks.py OUTPUT_FOLDER
Each rank writes OUTPUT_FOLDER/rank-N.json: the results as lists, and the calls of HCCL.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist


def values(rank, count, dtype=torch.float32):
    return (torch.arange(count) + 10.0 * rank).to(dtype).npu()


def main(output):
    import emulated_kernels

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.npu.set_device(rank)
    dist.init_process_group("hccl")
    found = {"backend": dist.get_backend(), "device": str(torch.empty(0, device="npu").device)}

    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32):
        x = values(rank, 3, dtype)
        dist.all_reduce(x)
        found[f"all_reduce {str(dtype).removeprefix('torch.')}"] = x.tolist()
    for name in ("MAX", "MIN", "AVG"):
        x = values(rank, 3)
        dist.all_reduce(x, getattr(dist.ReduceOp, name))
        found[f"all_reduce {name}"] = x.tolist()
    x = values(rank, 3)
    work = dist.all_reduce(x, async_op=True)
    work.wait()
    found["all_reduce async"] = x.tolist()
    x = values(rank, 3)
    dist.reduce(x, dst=size - 1)
    found["reduce"] = x.tolist() if rank == size - 1 else None

    parts = [torch.zeros(2, device="npu") for _ in range(size)]
    dist.all_gather(parts, values(rank, 2))
    found["all_gather"] = [p.tolist() for p in parts]
    whole = torch.zeros(2 * size, device="npu")
    dist.all_gather_into_tensor(whole, values(rank, 2))
    found["all_gather_into_tensor"] = whole.tolist()
    part = torch.zeros(2, device="npu")
    dist.reduce_scatter_tensor(part, values(rank, 2 * size))
    found["reduce_scatter_tensor"] = part.tolist()
    x = values(rank, 3)
    dist.broadcast(x, src=size - 1)
    found["broadcast"] = x.tolist()
    part = torch.zeros(2, device="npu")
    dist.scatter(part, [values(r, 2) for r in range(size)] if rank == 0 else None, src=0)
    found["scatter"] = part.tolist()
    mixed = torch.zeros(size, device="npu")
    dist.all_to_all_single(mixed, values(rank, size))
    found["all_to_all_single"] = mixed.tolist()
    if rank == 0:
        dist.send(values(7, 3), dst=size - 1)
    elif rank == size - 1:
        x = torch.zeros(3, device="npu")
        dist.recv(x, src=0)
        found["recv"] = x.tolist()

    objects = [None] * size
    dist.all_gather_object(objects, {"rank": rank})
    found["all_gather_object"] = objects
    box = [{"from": rank}]
    dist.broadcast_object_list(box, src=0)
    found["broadcast_object_list"] = box
    dist.barrier()

    pair = dist.new_group([0, size - 1])
    x = values(rank, 2)
    if rank in (0, size - 1):
        dist.all_reduce(x, group=pair)
    found["all_reduce of two"] = x.tolist()

    # a collective on its own stream, with work before and after on the current one
    x = torch.full((1000,), float(rank + 1), device="npu")
    for _ in range(5):
        x = x * 2
        dist.all_reduce(x)
        x = x / size
    found["chain"] = x.unique().tolist()

    model = torch.nn.Linear(4, 3).npu()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5 * (rank + 1))  # DDP spreads rank 0's
    wrapped = torch.nn.parallel.DistributedDataParallel(model, device_ids=[rank])
    wrapped(torch.full((2, 4), float(rank), device="npu")).sum().backward()
    found["ddp weight"] = model.weight.unique().tolist()
    found["ddp gradient"] = model.weight.grad.unique().tolist()

    found["calls"] = {k: v for k, v in emulated_kernels.kernel_calls().items() if k.startswith("Hccl")}
    # the last rank ends without a word: the others' next collective must fail, not wait for ever
    dist.barrier()
    torch.npu.synchronize()
    if rank < size - 1:
        try:
            dist.all_reduce(x)
            torch.npu.synchronize()
            found["after a rank ended"] = None
        except RuntimeError as problem:
            found["after a rank ended"] = str(problem)
    Path(output, f"rank-{rank}.json").write_text(json.dumps(found, indent=1))
    os._exit(0)  # the group is broken; taking it down in order would wait for the rank that is gone


if __name__ == "__main__":
    main(*sys.argv[1:])
