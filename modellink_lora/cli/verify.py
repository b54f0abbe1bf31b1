"""`modellink-lora verify`: the flags of training in, a verdict on the setup out."""

from __future__ import annotations

from collections.abc import Sequence

from modellink_lora.cli.accepted import ACCEPTED, REFUSED
from modellink_lora.cli.flags import build_parser
from modellink_lora.cli.launch import Launch
from modellink_lora.cli.processes import joined
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.model import ModelConfig
from modellink_lora.config.parallel import ParallelConfig
from modellink_lora.config.train import SftDataConfig, TrainConfig
from modellink_lora.config.verify import VerifyConfig

_DEFAULTS = {"lr": 1e-3, "train_iters": 1}  # required in training; the latter has no effect here


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the job. Returns 0 when all checks passed."""
    launch = Launch.from_environment()
    parser = build_parser(
        "modellink-lora verify",
        "Check on your own model and devices that gradients are right and that layouts agree. Takes the flags of a "
        "training run; nothing is saved.",
        [VerifyConfig, TrainConfig, SftDataConfig, LoraConfig, ParallelConfig, ModelConfig],
        refused=REFUSED,
        accepted=ACCEPTED,
    )
    given = parser.parse(argv)
    # configs first: their messages need no process group and no device
    verification = VerifyConfig(**given[VerifyConfig])
    train = TrainConfig(**{**_DEFAULTS, **given[TrainConfig]})
    parallel = ParallelConfig(**given[ParallelConfig])
    for layout in (parallel, *verification.layouts()):
        layout.data_parallel_size(launch.world_size)
    minutes = train.distributed_timeout_minutes
    overlapping = train.overlaps_products and parallel.tensor_model_parallel_size > 1
    with joined(
        launch, device=train.device, timeout_minutes=minutes, deterministic=train.deterministic, overlapping=overlapping
    ) as joint:
        from modellink_lora.verification.verify import verify

        if launch.is_first:
            parser.report_accepted(print)
        good = verify(
            verification,
            train=train,
            data_flags=given[SftDataConfig],
            parallel=parallel,
            model_flags=given[ModelConfig],
            lora_flags=given[LoraConfig],
            device=joint[0],
            torch_device=joint[1],
        )
    return 0 if good else 1
