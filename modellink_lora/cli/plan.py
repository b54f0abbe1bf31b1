"""`modellink-lora plan`: a model and devices in, the layouts that fit and the command of the fastest out."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modellink_lora.cli.flags import build_parser
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.plan import PlanConfig

_CALIBRATION = "plan-calibration.json"
_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
_DEVICE_OF = {"cpu": "cpu", "910b": "npu"}  # all others of the table are CUDA


def main(argv: Sequence[str] | None = None) -> int:
    """Plan. Returns the exit status."""
    parser = build_parser(
        "modellink-lora plan",
        "List the layouts of a model on so many devices that fit, fastest first, with the command of the first. "
        "Predictions come from dimensions; nothing is trained.",
        [PlanConfig, LoraConfig],
    )
    given = parser.parse(argv)
    config = PlanConfig(**given[PlanConfig])
    lora = LoraConfig(**{"target_modules": _TARGETS, **given[LoraConfig]})
    # imported after the flags were checked: mistakes in them need not wait for torch
    from modellink_lora.planning.machines import chip_named

    chip_named(config.chip)
    report(config, lora)
    return 0


def report(config: PlanConfig, lora: LoraConfig) -> None:
    """Print model, machine, layouts and command. Raises UserError when nothing fits."""
    import dataclasses

    from modellink_lora.adapters.targets import adapted_linears, resolve_targets
    from modellink_lora.models.families import family_of
    from modellink_lora.planning.plan import Workload, launch_command, search
    from modellink_lora.reporting.report import print_table

    lora = dataclasses.replace(lora, target_modules=resolve_targets(lora.target_modules))
    model, load, before = open_model(config.model)
    if config.seq_length > model.max_position_embeddings:
        raise UserError(
            f"--seq-length {config.seq_length} exceeds the model's {model.max_position_embeddings} positions"
        )
    if beyond := model.beyond_llama():
        raise UserError(
            f"--model {config.model} has {', '.join(beyond)}, whose memory and time are not modelled: layouts are "
            "planned for Llama-like models only; measure a few iterations instead (--train-iters 5)"
        )
    machine, origin = _machine(config)
    work = Workload(
        model=model, linears=adapted_linears(family_of(model.hf_model_type), model, lora), dtype=config.dtype,
        adapter_dtype=lora.dtype or config.dtype, lora_dropout=lora.dropout, seq_length=config.seq_length,
        global_batch_size=config.global_batch_size, max_micro_batch_size=config.max_micro_batch_size,
    )  # fmt: skip
    found = search(work, machine, config.count)
    print_table("plan", [
        ("model", f"{config.model}: {model.num_layers} layers, hidden {model.hidden_size}, "
                  f"{model.parameter_count():,} parameters"),
        ("adapter", f"r {lora.r} on {' '.join(lora.target_modules)}"),
        ("step", f"{config.global_batch_size} samples of {config.seq_length} tokens, {config.dtype}"),
        ("devices", f"{config.count} x {config.chip}, {machine.per_host} a host, "
                    f"{machine.memory / 1e9:.1f} GB for tensors on each"),
        *origin,
    ])  # fmt: skip
    if not found.fitting:
        raise UserError(_nothing_fits(config, work, machine, found))
    count = min(config.top, len(found.fitting))
    print_table(
        f"fastest {count} of {len(found.fitting)} layouts that fit ({found.considered} considered)",
        _rows(found.fitting[:count], work, config.count),
        ("", "TP", "PP", "DP", "micro batch", "recompute", "GB", "step", "TFLOP/s", "time goes to"),
    )
    best = found.fitting[0]
    flags = ["--lora-r", str(lora.r), "--lora-alpha", f"{lora.alpha:g}", "--lora-target-modules", *lora.target_modules]
    flags += ["--lora-dropout", f"{lora.dropout:g}"] if lora.dropout else []
    flags += ["--lora-dtype", lora.dtype] if lora.dtype else []
    if before:
        print(before)
    print("command of the first, on every host:")
    print(_wrapped(launch_command(best, work, machine, load=load, lora=flags)))


def open_model(name: str) -> tuple[Any, str, str]:
    """(dimensions, what to give to --load, what to do before) of a preset, Hugging Face folder or checkpoint."""
    from modellink_lora.models.families import family_of
    from modellink_lora.models.presets import preset

    folder = Path(name)
    if not folder.exists():
        return preset(name.lower()), f"{name.lower()}-megatron", (
            f"before: convert the model's Hugging Face folder into {name.lower()}-megatron (convert_ckpt.py)"
        )  # fmt: skip
    if (folder / "config.json").is_file():
        from modellink_lora.checkpoint.hf import read_config_json

        config = read_config_json(folder, flag="--model")
        target = f"{folder.name}-megatron"
        command = ["python", "convert_ckpt.py", "--load-model-type", "hf", "--save-model-type", "mg", "--load-dir",
                   str(folder), "--save-dir", target]  # fmt: skip
        where = str(folder / "config.json")
        model = family_of(str(config.get("model_type"))).read_config(config, where=where)
        return model, target, f"before: {shlex.join(command)}"
    from modellink_lora.checkpoint.megatron_dist import open_megatron

    return open_megatron(folder, flag="--model").config, name, ""


def _machine(config: PlanConfig) -> tuple[Any, list[tuple[str, str]]]:
    """The machine, and what is to be said about where its numbers come from."""
    from modellink_lora.planning.machines import Assumed, calibrated, machine_of, save_calibration

    path = Path(config.calibration or _CALIBRATION)
    if config.calibrate:
        from modellink_lora.planning.calibrate import calibrate

        name = _DEVICE_OF.get(config.chip.lower(), "cuda")
        here = config.count if name == "cpu" else min(config.count, config.devices_per_host or 8)
        machine, facts = calibrate(
            name, config.dtype, min(here, _processes(name)), threads=int(os.environ.get("OMP_NUM_THREADS", "1"))
        )
        save_calibration(path, machine, facts)
        print(f"calibration: {path}")
    if not config.calibrate and not config.calibration:
        assumed = Assumed()
        return machine_of(config, assumed), [("assumption", line) for line in assumed.lines()]
    machine, facts = calibrated(path, config)
    link = machine.inside
    measured = (
        f"{facts['processes']} processes on {facts['device']}: matrix products {machine.matmul / 1e12:.3g} TFLOP/s, "
        f"element-wise operators {machine.stream / 1e9:.3g} GB/s, an operator {machine.operator * 1e6:.1f} us"
    )
    if facts["processes"] > 1:
        measured += f", collectives {link.latency * 1e6:.0f} us and {link.bandwidth / 1e9:.2g} GB/s"
    assumed_too = "nothing overlaps; samples have the full length; data, saving and validation cost nothing"
    if config.count > machine.per_host and not config.inter_bandwidth:
        assumed_too += "; other hosts are as near as this one's processes (say --inter-bandwidth)"
    return machine, [("measured", measured), ("assumption", assumed_too)]


def _processes(name: str) -> int:
    """Most processes that can measure at once here."""
    import torch

    if name == "cpu":
        return os.cpu_count() or 1
    from modellink_lora.device import get_device

    get_device(name)  # says what is missing
    return int(torch.accelerator.device_count())


def _rows(candidates: Sequence[Any], work: Any, devices: int) -> list[tuple[str, ...]]:
    from modellink_lora.planning.plan import describe_recompute, step_flops

    rows: list[tuple[str, ...]] = []
    for number, c in enumerate(candidates, 1):
        plan, total = c.plan, c.time.total
        most = sorted(c.time.parts.items(), key=lambda part: -part[1])[:3]
        stages = f"{c.stages}" + (f" x {c.chunks} chunks" if c.chunks > 1 else "")
        rows.append((
            str(number), f"{plan.tp}{' SP' if plan.sequence_parallel else ''}", stages,
            f"{plan.dp}{' shared' if plan.distributed_optimizer else ''}",
            f"{plan.micro_batch_size} x {plan.micro_batches}", describe_recompute(plan),
            f"{c.memory['total'] / 1e9:.1f}", _duration(total), f"{step_flops(work) / total / devices / 1e12:.3g}",
            ", ".join(f"{name} {part / total:.0%}" for name, part in most if part > 0.005 * total),
        ))  # fmt: skip
    return rows


def _nothing_fits(config: PlanConfig, work: Any, machine: Any, found: Any) -> str:
    if not found.considered:
        return (
            f"no layout of {config.model} divides over {config.count} devices: heads, groups and ffn by TP, layers by "
            f"PP, --global-batch-size {config.global_batch_size} by DP; try another batch size or number of devices"
        )
    least = found.smallest
    return (
        f"none of {found.considered} layouts fits into {machine.memory / 1e9:.1f} GB, not even with all layers "
        f"recomputed: the smallest, TP {least.plan.tp} PP {least.stages}, needs {least.memory['total'] / 1e9:.1f} GB; "
        "take more or larger devices, or a shorter --seq-length"
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _wrapped(words: Sequence[str]) -> str:
    """A command with one of the program's flags a line."""
    program = words.index("posttrain_gpt.py") + 1
    lines = [list(words[:program])]
    for word in words[program:]:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return " \\\n    ".join(" ".join(w if w.startswith("$") else shlex.quote(w) for w in line) for line in lines)
