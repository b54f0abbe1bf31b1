"""What a comparison of base, unmerged and merged models has measured, and which differences rounding explains.

Letters: n tokens of prompt and answer, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

BASE, UNMERGED, MERGED_HF, MERGED_META = "base", "unmerged", "merged (HF)", "merged (Meta)"
MERGED = (MERGED_HF, MERGED_META)
# Of a sum of many small errors the largest among thousands of logits is some five times the usual one.
_LARGEST = 5.0


@dataclass
class Gap:
    """How far a variant's logits are from the reference's, at every position of prompts and reference answers."""

    largest: float = 0.0
    squares: float = 0.0
    numbers: int = 0
    positions: int = 0
    same_best: int = 0
    allowed: float | None = None  # largest difference that rounding explains; None where they need not agree

    def add(self, found: Tensor, expected: Tensor) -> None:
        """Logits [n, v] of both."""
        d = (found - expected).double()
        self.largest = max(self.largest, d.abs().max().item())
        self.squares += d.square().sum().item()
        self.numbers += d.numel()
        self.positions += len(d)
        self.same_best += int((found.argmax(-1) == expected.argmax(-1)).sum())

    @property
    def rms(self) -> float:
        return (self.squares / max(1, self.numbers)) ** 0.5

    @property
    def too_large(self) -> bool:
        return self.allowed is not None and not self.largest <= self.allowed  # nan is too large


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


class Logits:
    """The reference's logits in files, because those of long prompts and large vocabularies fill a memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.squares, self.numbers = 0.0, 0

    def keep(self, key: str, logits: Tensor) -> None:
        spread = (logits - logits.mean(-1, keepdim=True)).double()  # a constant added to all logits changes nothing
        self.squares += spread.square().sum().item()
        self.numbers += spread.numel()
        torch.save(logits, self._folder / key)

    def read(self, key: str) -> Tensor:
        return torch.load(self._folder / key)

    @property
    def rms(self) -> float:
        return (self.squares / max(1, self.numbers)) ** 0.5


def explained(dtypes: Sequence[torch.dtype], *, layers: int, spread: float) -> float:
    """The largest difference of a logit that rounding to `dtypes` explains, where logits usually lie `spread` apart.

    The weights of a merged model were rounded to the dtype of its files, what a layer computes is rounded to that of
    the computation, by eps / 2 of each number at most. Such errors are independent of each other, so over the two
    branches of each layer they add up like a root.
    """
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    return _LARGEST * eps * (2 * layers) ** 0.5 * spread
