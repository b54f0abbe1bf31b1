"""The fine-tuning job from first to last step."""

from __future__ import annotations

import importlib.metadata
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from modellink_lora import __version__
from modellink_lora.adapters.targets import trainable_table
from modellink_lora.checkpoint.adapter import AdapterMeta
from modellink_lora.checkpoint.store import TRACKER, read_tracker
from modellink_lora.config.errors import UserError
from modellink_lora.config.parallel import ParallelConfig
from modellink_lora.config.train import SftDataConfig, TrainConfig
from modellink_lora.data.tokenizer import load_tokenizer
from modellink_lora.device import Device
from modellink_lora.parallel.context import ParallelContext, make_context
from modellink_lora.parallel.random import seed_everything
from modellink_lora.training.base import open_base
from modellink_lora.training.data import RunData, open_data
from modellink_lora.training.flops import lora_step_flops, rank_memory
from modellink_lora.training.optimizer import learning_rate, make_optimizer, make_scheduler, wrap_data_parallel
from modellink_lora.training.report import Reporter, log_line, print_table
from modellink_lora.training.setup import Setup, choose_lora, set_up
from modellink_lora.training.state import Progress, resume, save
from modellink_lora.training.step import run_micro_batches, train_step

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
) -> None:
    """Train an adapter. The default process group exists and the device is active.

    Args:
        model_flags, lora_flags: ModelConfig and LoraConfig fields the user typed.
    Raises:
        UserError: any input that does not fit, before the first step where possible.
    """
    torch.use_deterministic_algorithms(train.deterministic)
    context = make_context(parallel, torch_device)
    lora, adapter = choose_lora(lora_flags, train.lora_load)
    if not train.load and "vocab_size" not in model_flags and data.tokenizer_name_or_path:
        model_flags = {**model_flags, "vocab_size": len(load_tokenizer(data.tokenizer_name_or_path))}
    base = open_base(
        train.load, model_flags, tp=context.tp_size, seed=train.seed, use_mcore_models=train.use_mcore_models
    )
    tokenizer = data.tokenizer_name_or_path or (str(base.tokenizer_folder) if base.tokenizer_folder else None)
    run_data = open_data(data, train, base.config, context, tokenizer=tokenizer)
    seed_everything(train.seed, context, device)
    setup = set_up(
        base, lora, adapter, context, device, dtype=train.dtype, seed=train.seed,
        overrides=_overrides(train, data, context),
    )  # fmt: skip
    notes = [*run_data.notes, *setup.notes]
    if not train.load:
        notes.insert(0, "warning: no --load was given, so the base model has RANDOM weights and learns nothing useful")
    if context.is_main:
        _summary(train, setup, run_data, context, device, notes)

    model = wrap_data_parallel(setup.model)
    optimizer = make_optimizer(train, model)
    scheduler = make_scheduler(train, optimizer, run_data.batch_size)
    root = Path(train.save) if train.save else None
    progress, told = Progress(data=run_data.order), []
    parts: dict[str, Any] = dict(layers=setup.layers, linears=setup.linears, optimizer=optimizer, scheduler=scheduler,
                                 context=context, device=device)  # fmt: skip
    if root and (root / TRACKER).is_file() and not (adapter and not train.finetune):
        told = [
            f"warning: --save {root} holds a run that ended at {read_tracker(root, flag='--save')}; it is overwritten"
        ]
    if adapter and not train.finetune:
        progress, told = resume(
            adapter, **parts, load_optimizer=not train.no_load_optim, load_rng=not train.no_load_rng,
            data=run_data.order,
        )  # fmt: skip
    elif adapter:
        told += [f"--finetune: starting at iteration 0 from the weights of {adapter.folder}"]
    reporter = Reporter(
        speaks=context.is_main, folder=root, tensorboard=train.tensorboard_dir,
        start=progress.iteration, total=train.train_iters,
    )  # fmt: skip
    for line in told:
        reporter.say(line)
    reporter.say("training ...")

    def save_now() -> None:
        assert root is not None
        reporter.say(f"saving checkpoint at iteration {progress.iteration} to {root}")
        meta = AdapterMeta(
            lora=lora, model=base.config, base_fingerprint=setup.fingerprint, iteration=progress.iteration,
            prompt_type=data.prompt_type or (run_data.corpus.sidecar or {}).get("prompt_type"),
            versions={"modellink_lora": __version__, **{n: importlib.metadata.version(n) for n in LIBRARIES}},
        )  # fmt: skip
        save(root, progress, meta=meta, **parts)
        reporter.say(f"successfully saved checkpoint at iteration {progress.iteration} to {root}")

    if progress.iteration == 0:  # what the base, or the adapter started from, scores
        _validate("valid", progress, model, run_data, reporter, context)
    model.train()
    _steps(train, progress, model, optimizer, scheduler, run_data, reporter, context, device, setup, save_now)
    for split in ("valid", "test"):
        _validate(split, progress, model, run_data, reporter, context)
    if root and progress.iteration % (train.save_interval or progress.iteration + 1):
        save_now()
    curve = reporter.close()
    if curve and context.is_main:
        print(f"loss curve: {curve}", flush=True)


def _steps(
    train: TrainConfig, progress: Progress, model: Any, optimizer: Any, scheduler: Any, run_data: RunData,
    reporter: Reporter, context: ParallelContext, device: Device, setup: Setup, save_now: Any,
) -> None:  # fmt: skip
    """All optimizer steps that are left, with logging, validation and saving in between."""
    stream = run_data.stream("train", consumed_samples=progress.consumed_samples)
    count = run_data.batch_size // (train.micro_batch_size * context.dp_size)
    shape = (train.micro_batch_size, run_data.padded_length)
    trainable = sum(linear.parameters for linear in setup.linears)
    window: list[float] = []
    steps = 0
    window_flops, window_start, first_line = 0.0, time.perf_counter(), True
    while progress.iteration < train.train_iters:
        result = train_step(model, optimizer, stream, context, count=count, shape=shape)
        progress.iteration += 1
        progress.consumed_samples += run_data.batch_size
        progress.skipped += result.skipped
        progress.updates += not result.skipped
        if not result.skipped:
            scheduler.step(run_data.batch_size)
            window.append(result.loss)
        _check_finite(train, progress, result.loss, result.grad_norm, result.skipped)
        steps += 1
        window_flops += lora_step_flops(setup.base.config, trainable, stream.take_lengths())
        reporter.step(result.loss)
        reporter.record(
            progress.iteration,
            {"lm loss": result.loss, "grad norm": result.grad_norm, "learning rate": learning_rate(optimizer),
             "trained tokens": result.tokens, "loss scale": float(optimizer.get_loss_scale())},
        )  # fmt: skip
        if progress.iteration % train.log_interval == 0:
            device.synchronize()
            seconds = time.perf_counter() - window_start
            flops = torch.tensor(window_flops, dtype=torch.float32, device=context.device)
            dist.all_reduce(flops, group=context.dp_group)
            reporter.say(
                log_line(
                    iteration=progress.iteration, train_iters=train.train_iters,
                    consumed_samples=progress.consumed_samples, milliseconds=1000 * seconds / steps,
                    tflops=float(flops) / seconds / context.world_size / 1e12 if train.log_throughput else None,
                    learning_rate=learning_rate(optimizer), batch_size=run_data.batch_size,
                    loss=sum(window) / max(1, len(window)), loss_scale=float(optimizer.get_loss_scale()),
                    grad_norm=result.grad_norm, skipped=progress.skipped, not_finite=progress.not_finite,
                )
            )  # fmt: skip
            if first_line:
                _say_memory(progress.iteration, context, device)
            window, steps, window_flops, window_start, first_line = [], 0, 0.0, time.perf_counter(), False
        if progress.iteration % train.eval_interval == 0 and progress.iteration < train.train_iters:
            _validate("valid", progress, model, run_data, reporter, context)
        if train.save_interval and progress.iteration % train.save_interval == 0:
            save_now()
        if train.exit_interval and progress.iteration % train.exit_interval == 0:
            reporter.say(f"--exit-interval: stopping after iteration {progress.iteration}")
            return


def _check_finite(train: TrainConfig, progress: Progress, loss: float, grad_norm: float | None, skipped: bool) -> None:
    """Stop on NaN or infinity, which no later step could mend; fp16's skipped overflows are its normal course."""
    if math.isfinite(loss) and (grad_norm is None or math.isfinite(grad_norm)):
        return
    progress.not_finite += 1
    if train.check_nan and not skipped:
        raise UserError(
            f"iteration {progress.iteration}: loss {loss}, gradient norm {grad_norm}; stopped before saving. "
            "Lower --lr, look at the data of this step, or give --no-check-for-nan-in-loss-and-grad to go on"
        )


def _validate(
    split: str, progress: Progress, model: Any, run_data: RunData, reporter: Reporter, context: ParallelContext
) -> None:
    """Loss over the same samples of `split` every time, without dropout."""
    batches = run_data.validation_batches(split)
    if not batches:
        return
    name = {"valid": "validation", "test": "test"}[split]
    micro = run_data.train.micro_batch_size
    model.eval()
    with torch.no_grad():
        result = run_micro_batches(
            model, run_data.stream(split), context, train=False,
            count=batches * run_data.batch_size // (micro * context.dp_size), shape=(micro, run_data.padded_length),
        )  # fmt: skip
    model.train()
    reporter.record(progress.iteration, {f"{name} loss": result.loss})
    reporter.say(
        f" {name} loss at iteration {progress.iteration} | lm loss value: {result.loss:.6E} | "
        f"lm loss PPL: {math.exp(min(20, result.loss)):.6E} |"
    )


def _overrides(train: TrainConfig, data: SftDataConfig, context: ParallelContext) -> dict[str, Any]:
    """Fields of megatron-core's configuration that a run decides."""
    return {
        "calculate_per_token_loss": train.loss_reduction == "token",
        "variable_seq_lengths": data.variable_seq_lengths and context.pp_size > 1,
        "recompute_granularity": train.recompute_granularity,
        "recompute_method": train.recompute_method,
        "recompute_num_layers": train.recompute_num_layers,
        "deterministic_mode": train.deterministic,
    }


def _say_memory(iteration: int, context: ParallelContext, device: Device) -> None:
    numbers = " | ".join(f"{name}: {value / 2**20:.1f}" for name, value in device.memory().items())
    print(f"[Rank {context.rank}] (after {iteration} iterations) memory (MB) | {numbers}", flush=True)


def _summary(
    train: TrainConfig, setup: Setup, run_data: RunData, context: ParallelContext, device: Device, notes: list[str]
) -> None:
    """Tables of model, layout, adapter and memory."""
    config, lora, base = setup.base.config, setup.lora, setup.base
    held = [p for p in setup.model.parameters() if not p.requires_grad]
    trained = [p for p in setup.model.parameters() if p.requires_grad]
    tokens = train.micro_batch_size * run_data.padded_length
    memory = rank_memory(
        sum(p.numel() for p in held), sum(p.numel() for p in trained), dtype=train.dtype,
        adapter_dtype=lora.dtype or train.dtype, config=config, tokens=tokens,
        layers=setup.partition.counts[0], tp=context.tp_size, sequence_parallel=context.sequence_parallel,
        recompute=train.recompute_granularity == "full",
    )  # fmt: skip
    parts = ", ".join(f"{name} {size / 2**20:,.0f} MB" for name, size in memory.items())
    sp = " with sequence parallel" if context.sequence_parallel else ""
    schedule = f"{train.lr_decay_style}, lr {train.lr:g} -> {train.min_lr:g}"
    print_table(
        "run",
        [
            ("model", f"{config.hf_model_type}, {config.num_layers} layers, hidden {config.hidden_size}, "
                      f"{config.parameter_count():,} parameters, from {base.root or 'random weights'}"),
            ("device", device.describe()),
            ("layout", f"{context.world_size} processes = TP {context.tp_size}{sp} x PP {context.pp_size} "
                       f"(layers {','.join(map(str, setup.partition.counts))}) x DP {context.dp_size}"),
            ("dtype", f"weights {train.dtype}, adapters {lora.dtype or train.dtype}, gradients and masters fp32"),
            ("adapter", f"r {lora.r}, alpha {lora.alpha:g}, scaling {setup.linears[0].scaling:g}, "
                        f"dropout {lora.dropout:g}"
                        + (f", from {setup.adapter.folder}" if setup.adapter else ", new")),
            ("data", f"{run_data.config.data_path[0]}: train {len(run_data.splits['train']):,}, "
                     f"validation {len(run_data.splits['valid']):,}, test {len(run_data.splits['test']):,} samples"),
            ("schedule", f"{train.train_iters} iterations x {run_data.batch_size} samples, {schedule}"),
            ("memory a rank", f"about {sum(memory.values()) / 2**20:,.0f} MB: {parts}"),
        ],
    )  # fmt: skip
    print_table(
        "trainable parameters (all tensor and pipeline ranks together)",
        trainable_table(setup.linears, config),
        ("module", "layers", "lora_A", "lora_B", "over tensor ranks", "parameters"),
    )
    trainable = sum(linear.parameters for linear in setup.linears)
    total = trainable + config.parameter_count()
    print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")
    for note in notes:
        print(note if note.startswith("warning") else f"note: {note}")
