"""`posttrain_gpt.py`: flags and launcher facts in, one fine-tuning job out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from modellink_lora.cli.accepted import ACCEPTED, REFUSED
from modellink_lora.cli.ending import outlast_readers
from modellink_lora.cli.flags import Parser, build_parser
from modellink_lora.cli.launch import Launch
from modellink_lora.cli.processes import joined, one_writer
from modellink_lora.cli.signals import stopping
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.config.parallel import ParallelConfig
from modellink_lora.config.train import SftDataConfig, TrainConfig


def main(argv: Sequence[str] | None = None, *, pretrain: bool = False) -> int:
    """Fine-tune. `pretrain` is set by pretrain_gpt.py, which older scripts call for instruction data too."""
    outlast_readers()
    launch = Launch.from_environment()
    parser = training_parser("pretrain_gpt.py" if pretrain else "posttrain_gpt.py")
    given = parser.parse(argv)
    if pretrain and not given[SftDataConfig].get("is_instruction_dataset"):
        raise UserError(
            "pretraining is not offered; for instruction data give --is-instruction-dataset or call posttrain_gpt.py"
        )
    # configs first: their messages need no process group and no device
    train, data = TrainConfig(**given[TrainConfig]), SftDataConfig(**given[SftDataConfig])
    parallel = ParallelConfig(**given[ParallelConfig])
    train.batch_size(parallel.data_parallel_size(launch.world_size))
    save = Path(train.save) if train.save else None
    with (
        stopping(launch, save) as stop,
        joined(
            launch,
            device=train.device,
            timeout_minutes=train.distributed_timeout_minutes,
            deterministic=train.deterministic,
            overlapping=train.overlaps_products and parallel.tensor_model_parallel_size > 1,
            stop=stop,
        ) as (device, here),
        one_writer(launch, save),
    ):
        from modellink_lora.training.job import fine_tune

        if launch.is_first:
            parser.report_accepted(print)
        fine_tune(
            train=train,
            data=data,
            parallel=parallel,
            model_flags=given[ModelConfig],
            lora_flags=given[LoraConfig],
            device=device,
            torch_device=here,
            stop=stop,
            attempt=int(launch.attempt),
        )
    return 0


def training_parser(prog: str) -> Parser:
    """The flags of a training run."""
    return build_parser(
        prog,
        "Fine-tune a model with LoRA on tensor, sequence, pipeline and data parallel processes.",
        [TrainConfig, SftDataConfig, LoraConfig, ParallelConfig, ModelConfig],
        refused=REFUSED,
        accepted=ACCEPTED,
    )
