"""A few steps on GPUs with both implementations of the layers: started by torchrun, one process a GPU.

Words: a file for the two traces, then trace_of's arguments as JSON.
"""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist


def main() -> None:
    from modellink_lora.parallel.context import start_processes
    from tests.helpers.te import trace_of

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    start_processes("nccl", rank=rank, world_size=size, init_method="env://", timeout_minutes=5)
    arguments = json.loads(sys.argv[2])
    traces = {impl: trace_of(impl, gpu=rank, **arguments) for impl in ("local", "transformer_engine")}
    if rank == 0:
        torch.save(traces, sys.argv[1])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
