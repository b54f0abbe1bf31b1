"""The fine-tuning job: everything is opened and checked, then the loop runs."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from modellink_lora import __version__
from modellink_lora.adapters.fused import FUSION_HEADER
from modellink_lora.adapters.targets import trainable_table
from modellink_lora.checkpoint.adapter import AdapterMeta
from modellink_lora.config.parallel import ParallelConfig
from modellink_lora.config.train import SftDataConfig, TrainConfig
from modellink_lora.device import Device
from modellink_lora.models.build import DTYPES
from modellink_lora.parallel.context import make_context
from modellink_lora.planning.flops import lora_step_flops
from modellink_lora.reporting.report import Reporter
from modellink_lora.reporting.run_record import run_facts
from modellink_lora.reporting.telemetry import Telemetry
from modellink_lora.reporting.trackers import Wandb
from modellink_lora.training.assembly import assemble, fusion_notes, longest, open_inputs
from modellink_lora.training.graphs import passes_of
from modellink_lora.training.guards import Guards
from modellink_lora.training.keeper import Keeper
from modellink_lora.training.loop import Loop
from modellink_lora.training.start import begin, check_save, restarted
from modellink_lora.training.state import take_snapshot
from modellink_lora.training.summary import ADAPTER_HEADER, fusion_of_all, memory_of, print_summary, summary_rows

LIBRARIES = ("torch", "megatron-core", "transformers")


def fine_tune(
    *,
    train: TrainConfig,
    data: SftDataConfig,
    parallel: ParallelConfig,
    model_flags: Mapping[str, Any],
    lora_flags: Mapping[str, Any],
    device: Device,
    torch_device: torch.device,
    stop: Callable[[], str | None] = lambda: None,
    attempt: int = 0,
) -> None:
    """Train an adapter. The default process group exists and the device is active.

    Args:
        model_flags, lora_flags: ModelConfig and LoraConfig fields the user typed.
        stop: name of a signal that asks this process to save and stop, or None.
        attempt: how often the launcher has started this job before.
    Raises:
        UserError: any input that does not fit, before the first step where possible.
    """
    torch.use_deterministic_algorithms(train.deterministic)
    unused = device.leave_out(train.npu_plain_operators)
    context = make_context(parallel, torch_device)
    train, again = restarted(train, attempt)
    inputs = open_inputs(train, data, context, model_flags=model_flags, lora_flags=lora_flags)
    base, lora, adapter, run_data = inputs.base, inputs.lora, inputs.adapter, inputs.data
    partition, linears = inputs.partition, inputs.linears
    check_save(train, adapter)
    memory = memory_of(train, base, lora, linears, partition, run_data, context)
    rows = summary_rows(
        train, base, lora, f"from {adapter.folder}" if adapter else "new", linears, partition, run_data, context,
        device, memory,
    )  # fmt: skip
    assembly = assemble(inputs, train, context, device)
    setup, chunks, parts = assembly.setup, assembly.chunks, assembly.parts
    notes = [*run_data.notes, *setup.notes, *(adapter.notes if adapter else ()), *fusion_notes(train, device), *unused]
    if not train.load:
        notes.insert(0, "warning: no --load was given, so the base model has RANDOM weights and learns nothing useful")
    fusion: list[tuple[str, ...]] = []
    if train.lora_fusion:
        fusion, fallen = fusion_of_all(setup.layers, longest(train, run_data, context), context)
        notes += fallen
    if context.is_main:
        print_summary(rows, linears, base, notes, fusion)

    progress, told = begin(train, adapter, lora, parts, run_data)
    root = Path(train.save) if train.save else None
    facts = run_facts(
        configs=[train, data, lora, parallel, base.config], summary=rows, notes=notes, memory=memory[context.pp_rank],
        adapters=(ADAPTER_HEADER, trainable_table(linears, base.config)), fusion=(FUSION_HEADER, fusion),
        device=device, context=context,
    )  # fmt: skip
    wandb = Wandb(train.wandb_project, train.wandb_exp_name, train.wandb_save_dir) if train.wandb_project else None
    reporter = Reporter(
        speaks=context.is_main, folder=root, tensorboard=train.tensorboard_dir, wandb=wandb, facts=facts,
        start=progress.iteration, total=train.train_iters,
    )  # fmt: skip
    trainable = sum(linear.parameters for linear in linears)
    telemetry = Telemetry(
        device, context, model_config=setup.chunks[0].config, dtype=DTYPES[train.dtype],
        flops=functools.partial(lora_step_flops, base.config, trainable), log_interval=train.log_interval,
    )  # fmt: skip
    guards = Guards(
        setup.chunks, setup.layers, linears, partition, context,
        layouts={spec.name: spec.layout for spec in base.family.tensors(base.config)} | parts.layouts,
        check_finite=train.check_nan, overflow_is_normal=train.fp16,
    )  # fmt: skip
    keeper = None
    if root:
        keeper = Keeper(
            root, context, limit=train.save_total_limit, in_background=train.async_save, say=reporter.say
        )  # fmt: skip

    def save(is_best: bool) -> None:
        assert keeper is not None
        meta = AdapterMeta(
            lora=lora, model=base.config, base_fingerprint=setup.fingerprint, iteration=progress.iteration,
            prompt_type=run_data.prompt_type or (adapter.meta.prompt_type if adapter and not train.finetune else None),
            versions={"modellink_lora": __version__, **{n: importlib.metadata.version(n) for n in LIBRARIES}},
        )  # fmt: skip
        keeper.save(progress.iteration, take_snapshot(progress, meta, parts), is_best=is_best)

    with reporter:
        for line in [*again, *told, "training ..."]:
            reporter.say(line)
        for chunk in chunks:
            chunk.train()
        Loop(
            train=train, data=run_data, chunks=chunks, optimizer=parts.optimizer, scheduler=parts.scheduler,
            progress=progress,
            guards=guards, reporter=reporter, telemetry=telemetry, context=context, device=device,
            save=save if keeper else None, stop=stop, passes=passes_of(train, device, reporter.say),
        ).run()  # fmt: skip
        if keeper:
            keeper.finish()
    if reporter.report:
        print(f"report: {reporter.report}", flush=True)
