"""`evaluation.py`: flags and launcher facts in, judgements of base and tuned model out."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from tqdm import tqdm

from modellink_lora.cli.accepted import INFERENCE_ACCEPTED, INFERENCE_REFUSED
from modellink_lora.cli.flags import Parser, build_parser
from modellink_lora.cli.launch import Launch
from modellink_lora.cli.processes import joined
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.engine import EngineConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.evaluate import EvalConfig
from modellink_lora.config.model import ModelConfig
from modellink_lora.config.parallel import ParallelConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the job. Returns the exit status."""
    launch = Launch.from_environment()
    parser = evaluation_parser()
    given = parser.parse(argv)
    # configs and data first: their messages need no process group and no model
    config, model = EvalConfig(**given[EvalConfig]), EngineConfig(**given[EngineConfig])
    parallel = ParallelConfig(**given[ParallelConfig])
    model = _with_batch_size(model, config.evaluation_batch_size, "max_batch_size" in given[EngineConfig])
    parallel.data_parallel_size(launch.world_size)
    from modellink_lora.evaluation.runner import evaluate, read_items

    work = read_items(config, model)
    with joined(launch, device=model.device, timeout_minutes=model.distributed_timeout_minutes) as (device, here):
        from modellink_lora.inference.session import open_engine

        def say(line: str) -> None:
            if launch.is_first:
                tqdm.write(line)  # above the progress bar, if there is one
                sys.stdout.flush()

        parser.report_accepted(say)
        with open_engine(
            model,
            parallel,
            model_flags=given[ModelConfig],
            lora_flags=given[LoraConfig],
            device=device,
            torch_device=here,
            say=say,
            replicas=True,
            adopt_template=False,  # figures of other programs are for plain prompts; a note says so
        ) as served:
            if served is not None:
                evaluate(
                    served.engine,
                    served.prompter,
                    config,
                    model=model,
                    work=work,
                    replica=served.replica,
                    replicas=served.replicas,
                    gather=served.gather,
                    say=say,
                    facts={"command": list(sys.argv[1:] if argv is None else argv), "about": dict(served.about)},
                )
    return 0


def _with_batch_size(model: EngineConfig, size: int | None, given_twice: bool) -> EngineConfig:
    if size is None:
        return model
    if given_twice and size != model.max_batch_size:
        raise UserError(
            f"--evaluation-batch-size {size} and --max-batch-size {model.max_batch_size} are one thing: give one"
        )
    return dataclasses.replace(model, max_batch_size=size)


def evaluation_parser() -> Parser:
    """The flags of an evaluation."""
    return build_parser(
        "evaluation.py",
        "Judge a model, base and tuned in one run, on benchmarks in their original file layouts.",
        [EvalConfig, EngineConfig, LoraConfig, ParallelConfig, ModelConfig],
        refused=INFERENCE_REFUSED,
        accepted=INFERENCE_ACCEPTED,
    )
