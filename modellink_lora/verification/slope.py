"""The gradient of the loss against finite differences of it: no backward pass, no second implementation needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from modellink_lora.models.layouts import Replicated
from modellink_lora.parallel.random import keyed_generator
from modellink_lora.training.state import Parts

_RISE = 2.0**-9  # of the loss, relative, that a step should make: far above fp32's rounding, yet nearly straight
_LONGEST = 1e-2  # a step, in elements of the adapter
ALLOWED = 1e-3  # relative; rounding of the loss alone makes 1e-5 of a rise that small


@dataclass(frozen=True)
class Slope:
    """The derivative of the loss along one direction of all adapters together."""

    by_gradient: float
    by_difference: float
    culprit: str | None = None  # the tensor that most of the difference comes from, if it is too large

    @property
    def error(self) -> float:
        largest = max(abs(self.by_gradient), abs(self.by_difference))
        return abs(self.by_gradient - self.by_difference) / largest if largest else 1.0


def measure_slope(parts: Parts, gradients: Mapping[str, Tensor], loss: Callable[[], float], *, seed: int) -> Slope:
    """Compare along one direction; on a mismatch halve the set of tensors until one is left.

    Args:
        gradients: this rank's shards by global name.
        loss: of the same samples with the same dropout masks; every process calls it.
    """
    direction = _direction(parts, gradients, seed)
    names = list(parts.layouts)
    level = loss()
    slope = Slope(*_both(parts, gradients, direction, loss, level, names))
    if slope.error <= ALLOWED:
        return slope
    rest = slope.by_gradient - slope.by_difference
    while len(names) > 1:
        halves = names[: len(names) // 2], names[len(names) // 2 :]
        expected, found = _both(parts, gradients, direction, loss, level, halves[0])
        first, second = expected - found, rest - expected + found  # slopes along parts of a direction add up
        names, rest = (halves[0], first) if abs(first) >= abs(second) else (halves[1], second)
    return dataclasses.replace(slope, culprit=names[0])


def _direction(parts: Parts, gradients: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Of each tensor: half along its gradient, so that the loss changes, half noise, in a random proportion.

    Shards of one tensor may be scaled differently; replicas get the same numbers.
    """
    context, result = parts.context, {}
    for name, gradient in gradients.items():
        generator = keyed_generator(seed, f"slope {name}")
        weight = 0.5 + float(torch.rand((), generator=generator))
        whole = type(parts.layouts[name]) is Replicated
        if not whole:  # any numbers do, if every replica draws the same
            generator = keyed_generator(seed, f"slope {name} {context.tp_rank}")
        noise = torch.randn(gradient.shape, generator=generator).to(gradient)
        size = gradient.square().mean().sqrt()
        result[name] = weight * (gradient / size + noise if size > 0 else noise)
    return result


def _both(
    parts: Parts, gradients: Mapping[str, Tensor], direction: Mapping[str, Tensor], loss: Callable[[], float],
    level: float, names: Sequence[str],
) -> tuple[float, float]:  # fmt: skip
    """Slope along the part of `direction` in `names`: by the gradient, and by differences of the loss."""
    context, chosen = parts.context, [name for name in names if name in direction]
    own = torch.zeros(1, dtype=torch.float32, device=context.device)
    for name in chosen:
        if context.dp_rank == 0 and (context.tp_rank == 0 or type(parts.layouts[name]) is not Replicated):
            own += (gradients[name] * direction[name]).sum()
    dist.all_reduce(own)
    expected = float(own)
    kept = {name: parts.parameters[name].detach().clone() for name in chosen}

    def at(step: float) -> float:
        _move(parts, kept, direction, step)
        return loss()

    step = min(_LONGEST, _RISE * level / max(abs(expected), 1e-30))
    near = (at(step) - at(-step)) / (2 * step)
    far = (at(2 * step) - at(-2 * step)) / (4 * step)
    _move(parts, kept, direction, 0.0)
    return expected, (4 * near - far) / 3  # Richardson: what is left is of the fourth order in `step`


def _move(parts: Parts, kept: Mapping[str, Tensor], direction: Mapping[str, Tensor], step: float) -> None:
    with torch.no_grad():
        for name, start in kept.items():
            parts.parameters[name].copy_(start + step * direction[name])
