"""`modellink-lora lm-eval`: our flags, then `--`, then lm-eval's own, which its own command line reads."""

from __future__ import annotations

import contextlib
import io
import sys
from argparse import Namespace
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from modellink_lora.cli.accepted import INFERENCE_ACCEPTED, INFERENCE_REFUSED
from modellink_lora.cli.flags import build_parser
from modellink_lora.cli.launch import Launch
from modellink_lora.cli.processes import joined
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.engine import EngineConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.harness import MODEL, MODEL_ARGS, HarnessConfig
from modellink_lora.config.model import ModelConfig
from modellink_lora.config.parallel import ParallelConfig

_EXAMPLE = "modellink-lora lm-eval --load BASE --lora-load ADAPTER -- --tasks arc_easy"
_COMMANDS = ("run", "ls", "validate")
_OURS = {"batch_size": "--max-batch-size", "max_batch_size": "--max-batch-size", "device": "--device"}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the job. Returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    launch = Launch.from_environment()
    parser = build_parser(
        "modellink-lora lm-eval",
        f"Run lm-eval's tasks on a model with its adapter unmerged, e.g. {_EXAMPLE}. What follows -- are the arguments "
        "of lm-eval's own command line.",
        [HarnessConfig, EngineConfig, LoraConfig, ParallelConfig, ModelConfig],
        refused=INFERENCE_REFUSED,
        accepted=INFERENCE_ACCEPTED,
    )
    split = words.index("--") if "--" in words else len(words)
    given = parser.parse(words[:split])
    config = EngineConfig(**given[EngineConfig])
    if config.prompt_type or config.hf_chat_template:
        raise UserError("--prompt-type and --hf-chat-template: lm-eval writes the prompts; give --apply_chat_template "
                        "after the --, which takes the tokenizer's own template")  # fmt: skip
    if not config.split_special_tokens:
        raise UserError("--no-split-special-tokens: has no effect here: lm-eval writes the prompts, and special tokens "
                        "in them are tokens, as in its own backends")  # fmt: skip
    harness, parallel = HarnessConfig(**given[HarnessConfig]), ParallelConfig(**given[ParallelConfig])
    copies = parallel.data_parallel_size(launch.world_size)
    if copies > 1:
        raise UserError(
            f"{launch.world_size} processes are {copies} copies of the model, and lm-eval runs on one: start "
            f"{launch.world_size // copies}, or give a larger --tensor-model-parallel-size"
        )
    command, arguments = _lm_eval(words[split + 1 :], launch)
    texts = arguments.model_args or {}
    # by these it names the model in its results
    adapter = (config.adapters() | {"tuned": config.lora_load}).get(harness.adapter or "tuned")
    names = {"pretrained": config.load, **({"peft": adapter} if adapter else {})}
    arguments.model, arguments.model_args = MODEL, {**names, **texts}
    with (
        joined(launch, device=config.device, timeout_minutes=config.distributed_timeout_minutes) as (device, here),
        contextlib.ExitStack() as held,
    ):
        from modellink_lora.evaluation.harness import EngineLM, choice_of, register
        from modellink_lora.inference.session import Served, open_engine

        def say(line: str) -> None:
            if launch.is_first:
                print(line, flush=True)

        def served() -> Served | None:
            return held.enter_context(
                open_engine(
                    config, parallel, model_flags=given[ModelConfig], lora_flags=given[LoraConfig], device=device,
                    torch_device=here, say=say, adopt_template=False,
                )
            )  # fmt: skip

        def model() -> EngineLM:
            opened.append(served())
            assert opened[0] is not None, "the first process leads"
            choice = choice_of(opened[0], harness.adapter)
            return EngineLM(opened[0], choice, seed=config.seed, **texts)

        opened: list[Served | None] = []
        parser.report_accepted(say)
        if not launch.is_first:
            served()
            return 0
        for name, ours in _OURS.items():
            if getattr(arguments, name, None) is not None:
                say(f"lm-eval's --{name} has no effect: give {ours} before the --")
        register(model)
        try:
            command.execute(arguments)
        except (ValueError, OSError) as error:
            if opened:
                raise
            raise UserError(f"lm-eval: {error}") from error  # of its arguments: it has not asked for the model yet
    return 0


def _lm_eval(words: Sequence[str], launch: Launch) -> tuple[Any, Namespace]:
    """lm-eval's command line and what it has read; mistakes end the job as they end lm-eval itself."""
    if find_spec("lm_eval") is None:
        raise UserError("lm-eval is not installed: pip install 'modellink_lora[eval]'")
    if not words:
        raise UserError(f"nothing for lm-eval to do: write its arguments after --, e.g. {_EXAMPLE}")
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    setup_logging()
    # its parser reads sys.argv alone; every process reads the same words, one says what is wrong with them
    before, sys.argv = sys.argv, ["lm-eval", *([] if words[0] in _COMMANDS else ["run"]), *words]
    try:
        with contextlib.ExitStack() as quiet:
            if not launch.is_first:
                quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
                quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
            command = HarnessCLI()
            arguments = command.parse_args()
    finally:
        sys.argv = before
    if arguments.command != "run":
        raise UserError(f"lm-eval {arguments.command} needs no model: run it without modellink-lora")
    if arguments.model not in (None, MODEL):
        raise UserError(f"--model {arguments.model}: this job gives lm-eval its own model; leave the flag out, or run "
                        "lm-eval itself")  # fmt: skip
    if unknown := sorted(set(arguments.model_args or ()) - set(MODEL_ARGS)):
        raise UserError(f"--model_args {unknown[0]}=..: the flags before the -- describe the model; behind it "
                        f"--model_args takes {' and '.join(MODEL_ARGS)} only")  # fmt: skip
    return command, arguments
