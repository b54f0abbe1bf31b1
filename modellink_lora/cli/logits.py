"""`python -m modellink_lora logits`: flags and launcher facts in, logits of an unmerged model out."""

from __future__ import annotations

from collections.abc import Sequence

from modellink_lora.cli.flags import build_parser
from modellink_lora.cli.launch import Launch
from modellink_lora.cli.processes import joined
from modellink_lora.config.logits import LogitsConfig
from modellink_lora.config.parallel import ParallelConfig


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
    with joined(launch, device=config.device, timeout_minutes=config.distributed_timeout_minutes) as (device, here):
        from modellink_lora.inference.logits import prompt_logits

        prompt_logits(config, parallel, device=device, torch_device=here)
    return 0
