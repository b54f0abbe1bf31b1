"""Live bytes by name, the shapes of a micro-batch on a rank, and what the loss allocates and frees. Pure arithmetic.

Letters: t tensor parallel size, h hidden. All sizes are bytes on one rank.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}
TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclass(frozen=True)
class Footprint:
    """Bytes of one layer: kept from its forward to its backward, and the most alive at once in each, input included."""

    kept: int
    forward: int
    backward: int


@dataclass(frozen=True)
class Fusion:
    """How fused LoRA linears run (--lora-fusion)."""

    recompute_inputs: bool = True
    chunks: int | None = None  # None: chosen for each shape
    level: str = "auto"
    fused_collectives: bool = False  # --use-mc2, --use-symmetric-memory


@dataclass(frozen=True)
class Shapes:
    """Dimensions of one micro-batch on one rank; fields divided by t where the layer cuts them."""

    batch: int
    length: int  # padded
    hidden: int
    heads: int  # / t
    groups: int  # / t
    head_dim: int
    ffn: int  # / t
    vocab: int  # padded rows / t
    padded_vocab: bool  # this rank holds rows of the vocabulary's padding
    qk_norm: bool
    ranks: int  # t
    sequence_parallel: bool
    dtype: str
    adapter_dtype: str
    lora_dropout: float
    hidden_dropout: float
    attention_dropout: float
    fusion: Fusion | None = None  # None: the plain path
    cpu: bool = True

    @property
    def hash(self) -> int:
        """Bytes an element that drawing a dropout mask holds at once: three int32, but on a CPU (device/hashing.py)."""
        return 0 if self.cpu else 12

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def local_tokens(self) -> int:
        """Tokens of a norm or residual: under sequence parallelism each rank has its part."""
        return self.tokens // self.ranks if self.sequence_parallel else self.tokens

    @property
    def width(self) -> int:
        return WIDTH[self.dtype]

    @property
    def residual(self) -> int:
        """[s(/t), b, h]"""
        return self.local_tokens * self.hidden * self.width

    def wide(self, elements: int) -> int:
        """An fp32 copy of `elements`; in an fp32 model there is none."""
        return 4 * elements if self.width < 4 else 0


class Tape:
    """Live bytes by name; `peak` is the most since the tape began or `mark` was called."""

    def __init__(self) -> None:
        self.live = self.peak = 0
        self._sizes: dict[str, int] = {}

    def add(self, name: str, size: int) -> None:
        assert name not in self._sizes, name
        self._sizes[name] = size
        self.live += size
        self.peak = max(self.peak, self.live)

    def drop(self, *names: str) -> None:
        """Free; a name that is not there was never kept."""
        for name in names:
            self.live -= self._sizes.pop(name, 0)

    def spike(self, *sizes: int) -> None:
        """Allocate all of `sizes` and free them again."""
        self.peak = max(self.peak, self.live + sum(sizes))

    def mark(self) -> None:
        self.peak = self.live


@functools.lru_cache(maxsize=256)
def loss(shapes: Shapes) -> Footprint:
    """Final norm, output layer and cross entropy. `kept` is 0: the backward follows at once."""
    tape = Tape()
    elements = shapes.local_tokens * shapes.hidden
    logits = shapes.tokens * shapes.vocab * shapes.width
    tape.add("x", shapes.residual)
    norm_forward(tape, "norm", shapes, elements, shapes.local_tokens)  # held by a variable until the loss is there
    if shapes.sequence_parallel:
        tape.spike(shapes.tokens * shapes.hidden * shapes.width, logits)
    tape.add("logits", logits)
    if shapes.padded_vocab:
        tape.add("padding hidden", logits)  # a copy: padding rows take no part in the softmax
    tape.add("softmax", shapes.wide(shapes.tokens * shapes.vocab))  # in place where logits are fp32
    forward = tape.peak
    if shapes.width < 4 or shapes.padded_vocab:
        tape.drop("logits")
    if shapes.width < 4:
        tape.drop("padding hidden")
    tape.drop("norm")
    tape.mark()
    if shapes.width < 4:
        tape.add("d logits", logits)
        tape.drop("softmax")
    if shapes.padded_vocab:
        tape.spike(logits)
    tape.spike(shapes.tokens * shapes.hidden * shapes.width)
    tape.drop("logits", "padding hidden", "d logits")
    tape.add("d norm", shapes.residual)
    norm_backward(tape, elements)
    return Footprint(0, forward, tape.peak)


def norm_forward(tape: Tape, name: str, shapes: Shapes, elements: int, rows: int) -> None:
    """RMSNorm (device/elementwise.py): of its pieces it keeps one fp32 number a row, and the caller its input."""
    size, wide = elements * shapes.width, shapes.wide(elements)
    tape.spike(wide, 4 * elements)  # squares
    tape.spike(wide, 4 * elements, size)  # normed; rounded, or times the weight
    tape.add(f"{name} inverse", 4 * rows)
    tape.add(name, size)


def norm_backward(tape: Tape, elements: int) -> None:
    """normed, gradient times weight, their product; the result takes the place of one of them."""
    tape.spike(3 * 4 * elements)


def logits_bytes(shapes: Shapes) -> int:
    """The part of `loss(shapes).forward` that is as wide as the vocabulary."""
    elements = shapes.tokens * shapes.vocab
    return elements * shapes.width * (2 if shapes.padded_vocab else 1) + shapes.wide(elements)
