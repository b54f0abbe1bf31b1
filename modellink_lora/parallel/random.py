"""Randomness that does not depend on the layout: every draw is a function of a seed and of global names and numbers.

Tensors are drawn from (seed, name) and then cut. Dropout masks are hashed from (seed, site, sample, position, feature):
the same element is dropped on every layout, in every batching, and again when a layer is recomputed.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
from collections.abc import Iterator

import numpy
import torch
from torch import Tensor

from modellink_lora.device import Device
from modellink_lora.device.hashing import mix
from modellink_lora.parallel.context import ParallelContext

_SAMPLES = "samples of the micro-batch"


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


def site_key(seed: int, name: str) -> int:
    """A 32-bit number of its own, signed, for each (seed, place in the model)."""
    digest = hashlib.sha256(f"{seed}:dropout:{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little", signed=True)


def row_keys(site: int, samples: Tensor, positions: Tensor) -> Tensor:
    """int32 keys [s, b] of the tokens at `positions` [s] of `samples` [b] (int64), at one site."""
    low, high = samples.to(torch.int32), (samples >> 32).to(torch.int32)
    per_sample = mix(mix(low ^ site) + high)  # [b]
    return mix(per_sample + mix(positions.to(torch.int32)[:, None]))


def set_samples(samples: Tensor) -> None:
    """Say which samples [b] (int64, numbered over the whole run) the coming forward pass works on.

    They are kept among megatron-core's random states, because those it restores when it recomputes a layer: by then
    other micro-batches have passed.
    """
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    get_cuda_rng_tracker().states_[_SAMPLES] = samples


def current_samples() -> Tensor:
    """Samples [b] of the micro-batch that is being computed, or recomputed."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    return get_cuda_rng_tracker().states_[_SAMPLES]


@contextlib.contextmanager
def without_streams() -> Iterator[None]:
    """megatron-core does not enter its named random streams: what draws from none can then be recorded as a graph.

    Entering one reads and sets the state of the device's generator, which a recording does not allow.
    """
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    tracker.fork = lambda *_, **__: contextlib.nullcontext()
    try:
        yield
    finally:
        del tracker.fork  # the method of its class shows again


def seed_everything(seed: int, context: ParallelContext, device: Device) -> None:
    """Seed Python, numpy, torch and megatron's named streams. No result depends on them; stray draws repeat."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    own = seed + 100 * context.pp_rank + 10 * context.dp_rank
    random.seed(own)
    numpy.random.seed(own)
    torch.manual_seed(own)
    device.seed(own)
    model_parallel_cuda_manual_seed(own, force_reset_rng=True)
