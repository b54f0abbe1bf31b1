"""`inference.py`: flags and launcher facts in; answers, a chat, a server or a web page out."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from modellink_lora.cli.accepted import INFERENCE_ACCEPTED, INFERENCE_REFUSED
from modellink_lora.cli.flags import Parser, build_parser
from modellink_lora.cli.launch import Launch
from modellink_lora.cli.processes import joined
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.document import read_text
from modellink_lora.config.engine import EngineConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.infer import KEY_VARIABLE, InferConfig, check_api_key, without_effect
from modellink_lora.config.model import ModelConfig
from modellink_lora.config.parallel import ParallelConfig

_PACKAGES = {"server": ("fastapi", "uvicorn"), "web": ("gradio", "fastapi", "uvicorn")}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the job. Returns the exit status."""
    launch = Launch.from_environment()
    parser = inference_parser()
    given = parser.parse(argv)
    config, engine_config = InferConfig(**given[InferConfig]), EngineConfig(**given[EngineConfig])
    parallel = ParallelConfig(**given[ParallelConfig])
    last = config.last_task(terminal=sys.stdin is not None and sys.stdin.isatty())
    _check(parallel, launch, last)
    from modellink_lora.inference.listening import open_socket
    from modellink_lora.inference.prompt_file import prompts_of

    if last in _PACKAGES and launch.is_first:
        config = _with_key(config)
    prompts = prompts_of(config) if config.batch_tasks else []
    stopping, listener = _Wish(), None
    with contextlib.ExitStack() as held:
        if last in _PACKAGES:
            if launch.is_first:  # before minutes of loading
                listener = held.enter_context(open_socket(config.host, config.port_of(last)))
            held.enter_context(_heeding(stopping, launch))
        device, here = held.enter_context(
            joined(launch, device=engine_config.device, timeout_minutes=engine_config.distributed_timeout_minutes)
        )
        from modellink_lora.inference.session import open_engine

        say = _say if launch.is_first else _nothing
        parser.report_accepted(say)
        for line in without_effect(given[InferConfig], [*config.batch_tasks, *filter(None, [last])]):
            say(line)
        served = held.enter_context(
            open_engine(
                engine_config, parallel, model_flags=given[ModelConfig], lora_flags=given[LoraConfig],
                device=device, torch_device=here, say=say,
            )
        )  # fmt: skip
        if served is None:
            return 0
        if "adapter_scale" in given[InferConfig] and not served.engine.choices:
            say("--adapter-scale has no effect here: no adapter is loaded")
        if config.batch_tasks:
            from modellink_lora.inference.tasks import run_tasks

            run_tasks(prompts, config, served.engine, served.prompter, seed=engine_config.seed, say=say)
        if last == "chat":
            from rich.console import Console

            from modellink_lora.inference.chat import Chat

            Chat(config, served.engine, served.prompter, seed=engine_config.seed, console=Console()).run()
        elif listener is not None:
            if last == "web":
                from modellink_lora.inference.web import serve
            else:
                from modellink_lora.inference.server import serve
            stopping.listening = True
            serve(
                config, served.engine, served.prompter, listener, most_running=engine_config.max_batch_size,
                seed=engine_config.seed, stopping=stopping, say=say,
            )  # fmt: skip
    return 0


def _check(parallel: ParallelConfig, launch: Launch, last: str | None) -> None:
    """Raise UserError for what can be known before anything is loaded."""
    if (copies := parallel.data_parallel_size(launch.world_size)) > 1:
        raise UserError(
            f"{launch.world_size} processes are {copies} copies of the model, of which only one would answer: start "
            f"{launch.world_size // copies}, or give a larger --tensor-model-parallel-size or "
            "--pipeline-model-parallel-size"
        )
    if missing := [name for name in _PACKAGES.get(last or "", ()) if find_spec(name) is None]:
        raise UserError(f"--task {last} needs {', '.join(missing)}: pip install modellink_lora[web]")


def _with_key(config: InferConfig) -> InferConfig:
    """`config` with the key of the flag, else of the flag's file, else of the environment; UserError for a bad one."""
    if config.api_key is not None:
        return config
    if config.api_key_file is not None:
        key = read_text(Path(config.api_key_file)).removesuffix("\n").removesuffix("\r")
        where = f"--api-key-file {config.api_key_file}"
    elif KEY_VARIABLE in os.environ:
        key, where = os.environ[KEY_VARIABLE], f"{KEY_VARIABLE} in the environment"
    else:
        return config
    check_api_key(key, where)
    return replace(config, api_key=key, api_key_file=None)


class _Wish:
    """That a server ends. Until it listens a signal ends the process at once: there is nothing to finish."""

    def __init__(self) -> None:
        self.listening = False
        self.received = False

    def __call__(self) -> bool:
        return self.received


@contextlib.contextmanager
def _heeding(wish: _Wish, launch: Launch) -> Iterator[None]:
    """Inside the block Ctrl-C and SIGTERM make the server end after the answers it is writing.

    Both reach every process of a job, often twice. The other processes leave them to the first, which takes them along.
    """

    def noted(number: int, frame: object) -> None:
        wish.received = True
        if launch.is_first and not wish.listening:
            raise KeyboardInterrupt

    former = {number: signal.signal(number, noted) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _say(line: str) -> None:
    print(line, flush=True)


def _nothing(line: str) -> None:
    """Every process comes by where something is said; the first one says it."""


def inference_parser() -> Parser:
    """The flags of inference."""
    return build_parser(
        "inference.py",
        "Answer prompts with a base model and its adapter, unmerged, at any tensor and pipeline parallel layout.",
        [InferConfig, EngineConfig, LoraConfig, ParallelConfig, ModelConfig],
        refused=INFERENCE_REFUSED,
        accepted=INFERENCE_ACCEPTED,
    )
