"""From flags to an engine that answers: the leader works with it, the other processes of its replica follow."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from modellink_lora.checkpoint.adapter import Adapter
from modellink_lora.config.engine import EngineConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.parallel import ParallelConfig
from modellink_lora.data.tokenizer import load_tokenizer
from modellink_lora.device import Device
from modellink_lora.inference.engine import Engine
from modellink_lora.inference.executor import Executor
from modellink_lora.inference.model import load_stage, open_adapters, open_any_base
from modellink_lora.inference.prompting import Prompter
from modellink_lora.inference.request import TUNED
from modellink_lora.parallel.context import ParallelContext, collective_timeout, make_context
from modellink_lora.parallel.random import seed_everything


@dataclass(frozen=True)
class Served:
    """What a leader works with.

    Args:
        replica, replicas: which copy of the model this is, of how many.
        gather: collects a value of every replica at the first one, which gets the list; the others get None.
        about: what was loaded, for summaries and result files.
    """

    engine: Engine
    prompter: Prompter
    replica: int
    replicas: int
    gather: Callable[[Any], list[Any] | None]
    about: Mapping[str, Any]


@contextlib.contextmanager
def open_engine(
    config: EngineConfig,
    parallel: ParallelConfig,
    *,
    model_flags: Mapping[str, Any],
    lora_flags: Mapping[str, Any],
    device: Device,
    torch_device: torch.device,
    say: Callable[[str], None],
    replicas: bool = False,
    adopt_template: bool = True,
) -> Iterator[Served | None]:
    """The engine on a leader; None on the others, after their leader has left the block. The process group exists.

    Args:
        model_flags, lora_flags: ModelConfig and LoraConfig fields the user typed; they must agree with the files.
        replicas: whether several copies of the model may share the work.
        adopt_template: use the template that the adapter was trained with where no flag names one.
    """
    copies = parallel.data_parallel_size(dist.get_world_size())
    if copies > 1 and not replicas:
        raise UserError(f"{dist.get_world_size()} processes are {copies} copies of the model, of which one would work: "
                        f"start {parallel.model_parallel_size}, or give a larger "
                        "--tensor-model-parallel-size")  # fmt: skip
    if parallel.num_layers_per_virtual_pipeline_stage:
        raise UserError("--num-layers-per-virtual-pipeline-stage interleaves the stages of training and is of no use "
                        "here: leave it out; checkpoints and adapters load at any layout")  # fmt: skip
    context = make_context(dataclasses.replace(parallel, sequence_parallel=False), torch_device)
    is_leader = context.tp_rank == 0 and context.pp_rank == 0
    tell = say if context.is_main else _nothing
    for note in device.leave_out(config.npu_plain_operators):
        tell(note)
    base = open_any_base(config, model_flags, tp=context.tp_size)
    adapters = open_adapters(config, lora_flags, base)
    folder = config.tokenizer_name_or_path or base.tokenizer_folder
    if folder is None:
        raise UserError(f"--load {config.load} keeps no tokenizer: give its folder to --tokenizer-name-or-path")
    prompt_type = _template(config, adapters, adopt_template, tell)
    tokenizer = load_tokenizer(
        folder, prompt_type=prompt_type, use_fast=config.use_fast_tokenizer, trust_remote_code=config.trust_remote_code
    )
    prompter = Prompter(
        tokenizer, prompt_type=prompt_type, hf_chat_template=config.hf_chat_template, folder=Path(folder),
        stop_words=config.add_eos_token, split_special_tokens=config.split_special_tokens, say=tell,
    )  # fmt: skip
    longest = min(filter(None, (base.config.max_position_embeddings, base.config.exact_length)))
    if config.max_length and config.max_length > longest:
        raise UserError(f"--max-length {config.max_length}: the model has {longest} positions")
    seed_everything(config.seed, context, device)  # megatron-core wants its streams seeded; nothing is drawn from them
    stage, notes = load_stage(base, adapters, context, device, dtype=config.dtype)
    if not config.load:
        tell("warning: no --load was given, so the model has RANDOM weights and answers nonsense")
    if parallel.sequence_parallel:
        tell("--sequence-parallel has no effect: a token at a time leaves nothing to split along the sequence")
    for note in notes:
        tell(note)
    executor = Executor(stage, context, say=say if is_leader and context.is_main else _nothing)
    gather = _gatherer(context, copies)
    if not is_leader:
        executor.follow()
        yield None
        return
    engine = Engine(
        executor, tokenizer, choices=tuple(adapters), max_batch=config.max_batch_size,
        max_length=config.max_length or longest, use_cache=config.use_kv_cache,
    )  # fmt: skip
    about = _about(config, base.config.hf_model_type, adapters, context, device)
    tell(", ".join(f"{name} {value}" for name, value in about.items() if value))
    # an exception inside ends all processes together (cli/processes.py): the others are not told that all went well
    yield Served(engine, prompter, context.dp_rank, copies, gather, about)
    executor.dismiss()


def _nothing(line: str) -> None:
    """Said by another process."""


def _template(
    config: EngineConfig, adapters: Mapping[str, Adapter], adopt: bool, tell: Callable[[str], None]
) -> str | None:
    """Name of the template around prompts."""
    trained = {name: adapter.meta.prompt_type for name, adapter in adapters.items() if adapter.meta.prompt_type}
    for name, own in trained.items():
        if config.prompt_type and config.prompt_type != own:
            tell(f"warning: adapter {name} was trained with --prompt-type {own}, not {config.prompt_type}")
    kind = adapters[TUNED].meta.prompt_type if TUNED in adapters else None
    if config.prompt_type or config.hf_chat_template or kind is None:
        return config.prompt_type
    if adopt:
        tell(f"prompts get the template that the adapter was trained with: --prompt-type {kind}")
        return kind
    tell(f"note: the adapter was trained with --prompt-type {kind}; without that flag prompts get no template")
    return None


def _gatherer(context: ParallelContext, copies: int) -> Callable[[Any], list[Any] | None]:
    if copies == 1:
        return lambda value: [value]
    leaders: list[Any] = [None] * context.world_size
    mine = (context.tp_rank, context.pp_rank, context.dp_rank, context.rank)
    dist.all_gather_object(leaders, mine)
    ranks = [rank for tp, pp, _, rank in sorted(leaders, key=lambda one: one[2]) if tp == 0 and pp == 0]
    group = dist.new_group(ranks, backend="gloo", timeout=collective_timeout())

    def gather(value: Any) -> list[Any] | None:
        values: list[Any] | None = [None] * copies if context.rank == ranks[0] else None
        dist.gather_object(value, values, dst=ranks[0], group=group)
        return values

    return gather


def _about(
    config: EngineConfig, model: str, adapters: Mapping[str, Adapter], context: ParallelContext, device: Device
) -> dict[str, Any]:
    return {
        "model": config.load or "random weights",
        "family": model,
        "adapters": ", ".join(f"{name} ({adapter.folder})" for name, adapter in adapters.items()),
        "dtype": config.dtype,
        "layout": f"TP {context.tp_size} x PP {context.pp_size} x DP {context.dp_size}",
        "device": device.describe(),
    }
