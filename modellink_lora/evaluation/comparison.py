"""What a comparison of base, unmerged and merged models has measured, and how much of it rounding explains.

The effect of rounding depends on model and position, so it is measured: how far logits move when every weight moves by
up to half a unit of its last digit in the dtype of the merged files, or of the computation if that is coarser.

Letters: n tokens of prompt and answer, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

BASE, UNMERGED, MERGED_HF, MERGED_META = "base", "unmerged", "merged (HF)", "merged (Meta)"
MERGED = (MERGED_HF, MERGED_META)
# How many times rounding noise a merged model may be away from the reference. Where its files are coarser than the
# computation, rounding the weights is all that happened, and it is what was measured: 1 to 2 times. Elsewhere the sums
# of a layer in another order come on top: 3 to 4 times in fp32.
ALLOWED_COARSE, ALLOWED_FINE = 3.0, 8.0


@dataclass
class Gap:
    """How far a variant's logits are from the reference's, at every position of prompts and reference answers.

    Args:
        allowed: limit of `noises`; None where the two are not meant to be equal.
        dtype: to which the variant is rounded, in its files or in the computation.
        largest: difference of a logit.
        noises: the largest ratio of it, at a position, to what rounding does there.
    """

    allowed: float | None
    dtype: torch.dtype
    largest: float = 0.0
    noises: float = 0.0
    positions: int = 0
    same_best: int = 0

    def add(self, found: Tensor, expected: Tensor, noise: Tensor | None) -> None:
        """Logits [n, v] of both, and the rounding noise [n] of such logits."""
        furthest = largest_difference(found, expected)
        self.largest = max(self.largest, furthest.max().item())
        if noise is not None:
            # noise can be 0 by chance in a small model; a digit of the logits themselves is always within rounding
            floor = expected.abs().amax(-1) * torch.finfo(expected.dtype).eps
            self.noises = max(self.noises, (furthest / noise.maximum(floor)).max().item())
        self.positions += len(found)
        self.same_best += int((found.argmax(-1) == expected.argmax(-1)).sum())

    @property
    def too_large(self) -> bool:
        return self.allowed is not None and not self.noises <= self.allowed  # nan is too large


def largest_difference(found: Tensor, expected: Tensor) -> Tensor:
    """[n, v] -> [n]; nan is infinitely large."""
    return (found - expected).abs().nan_to_num(nan=float("inf")).amax(-1)


@dataclass
class Variant:
    """What was found out about one variant. Bytes are those of the first process."""

    name: str
    where: str
    answers: list[str] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    tokens_per_second: float = 0.0
    weight_bytes: int = 0
    cache_bytes: int = 0
    peak_bytes: int = 0
    dtype: torch.dtype | None = None  # stored
    gap: Gap | None = None  # None: the reference itself


@dataclass(frozen=True)
class Comparison:
    """Everything a report shows; `reference` is the variant that the others are measured against."""

    prompts: Sequence[str]
    variants: Sequence[Variant]
    reference: str
    about: Mapping[str, str]
    notes: Sequence[str]

    @property
    def wrong(self) -> list[Variant]:
        """Merged models that differ from the reference by more than rounding."""
        return [variant for variant in self.variants if variant.gap and variant.gap.too_large]


class Reference:
    """The reference's logits, in files, because those of long prompts and large vocabularies fill a memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._noise: dict[tuple[torch.dtype, str], Tensor] = {}

    def keep(self, key: str, logits: Tensor) -> None:
        """Logits [n, v] of one piece of a prompt."""
        torch.save(logits, self._folder / key)

    def read(self, key: str) -> Tensor:
        return torch.load(self._folder / key, weights_only=True)

    def keep_noise(self, key: str, dtype: torch.dtype, disturbed: Tensor) -> None:
        """Logits of the same model with `disturbed` weights."""
        self._noise[dtype, key] = largest_difference(disturbed, self.read(key))

    def noise(self, key: str, dtype: torch.dtype) -> Tensor:
        """[n]"""
        return self._noise[dtype, key]


def coarsest(dtypes: Iterable[torch.dtype | None]) -> torch.dtype:
    return max((dtype for dtype in dtypes if dtype), key=lambda dtype: torch.finfo(dtype).eps)
