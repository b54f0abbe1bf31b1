"""`posttrain_gpt.py`: flags and launcher facts in, one fine-tuning job out."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence

import torch.distributed as dist

from modellink_lora.cli.accepted import ACCEPTED, REFUSED
from modellink_lora.cli.flags import build_parser
from modellink_lora.cli.launch import Launch, set_environment_defaults
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.config.parallel import ParallelConfig
from modellink_lora.config.train import SftDataConfig, TrainConfig
from modellink_lora.device import get_device
from modellink_lora.parallel.context import start_processes


def main(argv: Sequence[str] | None = None, *, pretrain: bool = False) -> int:
    """Fine-tune. `pretrain` is set by pretrain_gpt.py, which older scripts call for instruction data too."""
    launch = Launch.from_environment()
    parser = build_parser(
        "pretrain_gpt.py" if pretrain else "posttrain_gpt.py",
        "Fine-tune a model with LoRA on tensor, sequence, pipeline and data parallel processes.",
        [TrainConfig, SftDataConfig, LoraConfig, ParallelConfig, ModelConfig],
        refused=REFUSED,
        accepted=ACCEPTED,
    )
    given = parser.parse(argv)
    if pretrain and not given[SftDataConfig].get("is_instruction_dataset"):
        raise UserError(
            "pretraining is not offered; for instruction data give --is-instruction-dataset or call posttrain_gpt.py"
        )
    # configs first: their messages need no process group and no device
    train, data = TrainConfig(**given[TrainConfig]), SftDataConfig(**given[SftDataConfig])
    parallel = ParallelConfig(**given[ParallelConfig])
    train.batch_size(parallel.data_parallel_size(launch.world_size))
    device = get_device(train.device if train.device != "auto" else launch.device)
    set_environment_defaults(device.name, deterministic=train.deterministic)
    quiet()
    torch_device = device.activate(launch.local_rank)
    # imported after the device is active: these import megatron-core
    from modellink_lora.training.loop import fine_tune

    start_processes(
        device.backend,
        rank=launch.rank,
        world_size=launch.world_size,
        init_method=f"tcp://{launch.master_address}:{launch.master_port}" if launch.world_size == 1 else "env://",
        timeout_minutes=train.distributed_timeout_minutes,
    )
    try:
        if launch.is_first:
            parser.report_accepted(print)
        fine_tune(
            train=train,
            data=data,
            parallel=parallel,
            model_flags=given[ModelConfig],
            lora_flags=given[LoraConfig],
            device=device,
            torch_device=torch_device,
        )
    finally:
        dist.destroy_process_group()
    return 0


def quiet() -> None:
    """megatron-core warns about optional GPU libraries at every start; none of them is used here."""
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\.core")
