"""`modellink-lora compare`: flags and launcher facts in, a comparison out; the exit status is its verdict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from modellink_lora.cli.accepted import INFERENCE_ACCEPTED, INFERENCE_REFUSED
from modellink_lora.cli.flags import build_parser
from modellink_lora.cli.launch import Launch
from modellink_lora.cli.processes import joined
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.compare import CompareConfig
from modellink_lora.config.engine import EngineConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.config.parallel import ParallelConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the job. Returns 1 when a merged model is not what base and adapter are together."""
    launch = Launch.from_environment()
    parser = build_parser(
        "modellink-lora compare",
        "Run base, unmerged adapter and merged models on the same prompts and compare answers, logits, speed and "
        "memory. The exit status is 1 when a merged model differs by more than rounding.",
        [CompareConfig, EngineConfig, LoraConfig, ParallelConfig, ModelConfig],
        refused=INFERENCE_REFUSED,
        accepted=INFERENCE_ACCEPTED,
    )
    given = parser.parse(argv)
    config, engine = CompareConfig(**given[CompareConfig]), EngineConfig(**given[EngineConfig])
    parallel = ParallelConfig(**given[ParallelConfig])
    if (copies := parallel.data_parallel_size(launch.world_size)) > 1:
        raise UserError(
            f"{launch.world_size} processes are {copies} copies of the model, of which one would work: start "
            f"{launch.world_size // copies}, or give a larger --tensor-model-parallel-size"
        )
    with joined(launch, device=engine.device, timeout_minutes=engine.distributed_timeout_minutes) as (device, here):
        from modellink_lora.evaluation.compare import agree, compare
        from modellink_lora.evaluation.compare_report import show, write

        def say(line: str) -> None:
            if launch.is_first:
                print(line, flush=True)

        parser.report_accepted(say)
        found = compare(
            config, engine, parallel, model_flags=given[ModelConfig], lora_flags=given[LoraConfig], device=device,
            torch_device=here, say=say,
        )  # fmt: skip
        if found is not None:
            show(found, say)
            if config.save:
                say(f"written: {', '.join(map(str, write(found, Path(config.save))))}")
        return int(agree(found is not None and bool(found.wrong)))
