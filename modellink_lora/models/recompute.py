"""How a tensor can be computed again, noted on the tensor itself: who needs it in backward then need not keep it.

A frozen layer keeps the inputs of its norms and of its gate for their own backward; an adapter behind them would keep
their outputs as well. With a recipe it keeps what is kept anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

_NOTE = "_recipe"  # of the Python object of one tensor: its views and copies have none


@dataclass(frozen=True)
class Recipe:
    """function(*inputs) is the tensor, bit for bit, as long as nobody writes to the inputs."""

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


def remember(output: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Note on `output`, which the backward of its own operator needs `inputs` for, how to compute it; returns it.

    Without a gradient there is no such backward: nobody keeps the inputs, and a note would keep them alive for nothing.
    """
    if output.requires_grad:
        setattr(output, _NOTE, Recipe(function, inputs))
    return output


def recipe_of(x: Tensor) -> Recipe | None:
    """What was noted on this very tensor."""
    return getattr(x, _NOTE, None)
