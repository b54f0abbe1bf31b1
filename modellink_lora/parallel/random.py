"""Randomness that does not depend on the layout: a tensor is drawn from (seed, its global name), then cut."""

from __future__ import annotations

import hashlib
import math
import random

import numpy
import torch
from torch import Tensor

from modellink_lora.device import Device
from modellink_lora.parallel.context import ParallelContext


def keyed_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator of its own for each (seed, name)."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def normal(name: str, shape: tuple[int, ...], *, seed: int, std: float) -> Tensor:
    """Full fp32 tensor of N(0, std^2), the same on every layout."""
    return torch.randn(shape, generator=keyed_generator(seed, name)) * std


def kaiming_uniform(name: str, shape: tuple[int, int], *, seed: int) -> Tensor:
    """Full fp32 lora_A [r, in] of U(-1/sqrt(in), 1/sqrt(in)): Kaiming with a = sqrt(5), as PEFT and ModelLink."""
    bound = 1.0 / math.sqrt(shape[1])
    return (torch.rand(shape, generator=keyed_generator(seed, name)) * 2 - 1) * bound


def seed_everything(seed: int, context: ParallelContext, device: Device) -> None:
    """Seed Python, numpy, torch and megatron's named streams; stages and replicas differ, tensor ranks as they must."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    own = seed + 100 * context.pp_rank + 10 * context.dp_rank
    random.seed(own)
    numpy.random.seed(own)
    torch.manual_seed(own)
    device.seed(own)
    model_parallel_cuda_manual_seed(own, force_reset_rng=True)


def rng_states(device: Device) -> dict[str, Tensor]:
    """Every random state of this process, as uint8 tensors (safetensors holds nothing else)."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    streams = get_cuda_rng_tracker().get_states()
    return {
        "torch": torch.get_rng_state(),
        "device": device.rng_state(),
        **{f"stream.{name}": state for name, state in sorted(streams.items())},
    }


def set_rng_states(states: dict[str, Tensor], device: Device) -> None:
    """The inverse of `rng_states`. Python's and numpy's generators drive nothing after start-up and are not kept."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    torch.set_rng_state(states["torch"])
    device.set_rng_state(states["device"])
    prefix = "stream."
    get_cuda_rng_tracker().set_states(
        {name.removeprefix(prefix): state for name, state in states.items() if name.startswith(prefix)}
    )
