"""Known devices as the planner sees them: makers' numbers, and how much of them is assumed to be reached.

A calibration file replaces all of it with numbers measured on the machine itself (planning/calibrate.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modellink_lora.checkpoint.store import replacing_file
from modellink_lora.config.document import read_document, to_json
from modellink_lora.config.errors import UserError
from modellink_lora.config.plan import PlanConfig
from modellink_lora.planning.cost import Link, Machine

_GIGA, _TERA = 1e9, 1e12


@dataclass(frozen=True)
class Chip:
    """Numbers of the maker's data sheet. Bandwidths are GB/s in one direction."""

    memory: float  # GB
    tflops: Mapping[str, float]  # dense, by dtype
    stream: float  # device memory
    intra: float  # to the other devices of the host, all links together
    inter: float  # to other hosts: one 400 or 200 Gb/s adapter for each device, as such hosts are usually built
    per_host: int


def _tensor_cores(half: float, single: float) -> dict[str, float]:
    return {"bf16": half, "fp16": half, "fp32": single}


CHIPS = {
    "H200": Chip(141, _tensor_cores(989, 67), 4800, 450, 50, 8),
    "H100": Chip(80, _tensor_cores(989, 67), 3350, 450, 50, 8),
    "A100-80GB": Chip(80, _tensor_cores(312, 19.5), 2039, 300, 25, 8),
    "910B": Chip(64, _tensor_cores(313, 78), 1600, 196, 25, 8),
    "CPU": Chip(16, _tensor_cores(0.1, 0.1), 10, 1, 1, 1),  # stands for nothing: calibrate
}


@dataclass(frozen=True)
class Assumed:
    """Part of a data sheet's number that a run reaches, and times that no data sheet tells."""

    matmul: float = 0.7
    attention: float = 0.4
    stream: float = 0.75
    link: float = 0.7
    inside_latency: float = 8e-6
    between_latency: float = 15e-6
    operator: float = 5e-6

    def lines(self) -> list[str]:
        return [
            f"matrix products reach {self.matmul:.0%} of the peak, attention {self.attention:.0%}, element-wise "
            f"operators {self.stream:.0%} of the memory bandwidth, collectives {self.link:.0%} of the link",
            f"a message takes {self.inside_latency * 1e6:.0f} us inside a host and {self.between_latency * 1e6:.0f} us "
            f"between hosts besides its bytes, a collective one for each doubling of its ranks; launching an operator "
            f"takes {self.operator * 1e6:.0f} us",
            "nothing overlaps but launches with kernels; samples have the full length; data, saving and validation "
            "cost nothing",
        ]


def chip_named(name: str) -> Chip:
    """The table's row, whatever the case. Raises UserError listing what there is."""
    for known, chip in CHIPS.items():
        if known.lower() == name.lower():
            return chip
    raise UserError(
        f"--devices: {name} is not in the table ({', '.join(CHIPS)}); take the nearest and give --device-memory-gb, "
        "--device-tflops, --memory-bandwidth, --intra-bandwidth, --inter-bandwidth and --devices-per-host"
    )


def machine_of(config: PlanConfig, assumed: Assumed) -> Machine:
    """The machine that a chip of the table, changed by flags, makes."""
    chip = chip_named(config.chip)
    peak = (config.device_tflops or chip.tflops[config.dtype]) * _TERA
    return Machine(
        name=config.chip,
        memory=(config.device_memory_gb or chip.memory) * _GIGA * config.memory_fraction,
        matmul=peak * assumed.matmul,
        attention=peak * assumed.attention,
        stream=(config.memory_bandwidth or chip.stream) * _GIGA * assumed.stream,
        operator=assumed.operator,
        queued=config.chip.upper() != "CPU",
        per_host=config.devices_per_host or chip.per_host,
        inside=Link(assumed.inside_latency, (config.intra_bandwidth or chip.intra) * _GIGA * assumed.link),
        between=Link(assumed.between_latency, (config.inter_bandwidth or chip.inter) * _GIGA * assumed.link),
    )


def save_calibration(path: Path, machine: Machine, facts: Mapping[str, Any]) -> None:
    """Keep measured rates, with what they were measured on."""
    with replacing_file(path) as temporary:
        text = to_json({"measured on": dict(facts), **dataclasses.asdict(machine)}, indent=2, ensure_ascii=True)
        temporary.write_text(text + "\n")


def calibrated(path: Path, config: PlanConfig) -> tuple[Machine, dict[str, Any]]:
    """The machine of a calibration file, with memory and host size as flags or the table say, and its origin."""
    if not path.is_file():
        raise UserError(f"--calibration {path}: no such file; measure with --calibrate")
    try:
        stored = read_document(path, dict[str, Any])
        facts = stored.pop("measured on")
        if stored.get("weights", 0) is None:  # JSON has no infinity
            stored["weights"] = math.inf
        for name in ("inside", "between", "scatter"):
            stored[name] = Link(**stored[name]) if stored[name] else None
        machine = Machine(**stored)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--calibration {path}: not a calibration of this version ({error}); measure anew") from None
    if facts["dtype"] != config.dtype:
        raise UserError(f"--calibration {path} was measured in {facts['dtype']}, --dtype says {config.dtype}")
    chip = chip_named(config.chip)
    return dataclasses.replace(
        machine,
        memory=(config.device_memory_gb or chip.memory) * _GIGA * config.memory_fraction,
        per_host=config.devices_per_host or max(chip.per_host, facts["processes"]),
        between=Link(machine.between.latency, config.inter_bandwidth * _GIGA)
        if config.inter_bandwidth
        else machine.between,
    ), facts
