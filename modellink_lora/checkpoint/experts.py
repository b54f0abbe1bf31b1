"""Experts in rank files: which expert-parallel rank holds which under which number, and layouts that join several.

Experts are dealt out in consecutive blocks; every other tensor is on every expert-parallel rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig

_NUMBER = re.compile(r"(?<=\.mlp\.experts\.local_experts\.)\d+")
_GROUPED = re.compile(r"(.+\.mlp\.)experts\.weight([12])")
_NUMBERED = re.compile(r"(.+\.mlp\.experts\.)(linear_fc[12]\.weight)(\d+)")


def expert_of(name: str) -> int | None:
    """Number of the expert that the tensor `name` belongs to; None for all others."""
    match = _NUMBER.search(name)
    return int(match[0]) if match else None


def renumbered(name: str, shift: int) -> str:
    """`name` with the number of its expert, if it has one, changed by `shift`."""
    return _NUMBER.sub(lambda match: str(int(match[0]) + shift), name)


def holders(name: str, experts: int, ep: int) -> Sequence[int]:
    """The ranks of `ep` that hold the tensor of global name `name`, where there are `experts` in all."""
    expert = expert_of(name)
    return range(ep) if expert is None else [expert // (experts // ep)]


def count_experts(names: Iterable[str]) -> int:
    return 1 + max((expert for name in names if (expert := expert_of(name)) is not None), default=-1)


def check_expert_parallel(config: ModelConfig, ep: int) -> None:
    """Raise UserError when the experts of this model cannot be dealt out evenly to `ep` ranks."""
    if ep > 1 and not config.num_experts:
        raise UserError(f"--target-expert-parallel-size {ep}: this model has no experts; leave the flag out")
    if config.num_experts % ep:
        raise UserError(
            f"--target-expert-parallel-size {ep} does not divide the {config.num_experts} experts of this model"
        )


def separate(tensors: Sequence[tuple[str, Tensor]], ep: int) -> Iterator[tuple[str, Tensor]]:
    """`tensors` of one file with joined or otherwise named experts as `local_experts.E`, nothing being read.

    `experts.weight1` is [experts, h, f] in memory, `weight2` [experts, f, h]: transposed, gate before up in f.
    """
    shapes = {name: tensor.shape for name, tensor in tensors}
    for name, tensor in tensors:
        if match := _NUMBERED.fullmatch(name):
            yield f"{match[1]}local_experts.{match[3]}.{match[2]}", tensor
        elif match := _GROUPED.fullmatch(name):
            router = shapes.get(f"{match[1]}router.weight")
            if router is None or tensor.dim() != 2 or tensor.numel() % (router[0] // ep * router[1]):
                raise UserError(f"{name} {list(tensor.shape)} does not fit the router beside it, or there is none")
            each, hidden = router[0] // ep, router[1]
            experts = tensor.view(each, hidden, -1) if match[2] == "1" else tensor.view(each, -1, hidden)
            for number, expert in enumerate(experts):
                yield f"{match[1]}experts.local_experts.{number}.linear_fc{match[2]}.weight", expert.t()
        else:
            yield name, tensor
