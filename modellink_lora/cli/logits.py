"""`python -m modellink_lora logits`: flags and launcher facts in, logits of an unmerged model out."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from modellink_lora.cli.flags import build_parser
from modellink_lora.cli.launch import Launch, set_environment_defaults
from modellink_lora.cli.train import quiet
from modellink_lora.config.logits import LogitsConfig
from modellink_lora.config.parallel import ParallelConfig
from modellink_lora.device import get_device
from modellink_lora.parallel.context import start_processes


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the job. Returns the exit status."""
    launch = Launch.from_environment()
    parser = build_parser(
        "modellink-lora logits",
        "Write the logits of prompts, from a base checkpoint with or without an adapter, at any parallel layout.",
        [LogitsConfig, ParallelConfig],
    )
    given = parser.parse(argv)
    config, parallel = LogitsConfig(**given[LogitsConfig]), ParallelConfig(**given[ParallelConfig])
    parallel.data_parallel_size(launch.world_size)
    device = get_device(config.device if config.device != "auto" else launch.device)
    set_environment_defaults(device.name)
    quiet()
    torch_device = device.activate(launch.local_rank)
    # imported after the device is active: this imports megatron-core
    from modellink_lora.inference.logits import prompt_logits

    start_processes(
        device.backend,
        rank=launch.rank,
        world_size=launch.world_size,
        init_method=f"tcp://{launch.master_address}:{launch.master_port}" if launch.world_size == 1 else "env://",
        timeout_minutes=config.distributed_timeout_minutes,
    )
    try:
        prompt_logits(config, parallel, device=device, torch_device=torch_device)
    finally:
        dist.destroy_process_group()
    return 0
