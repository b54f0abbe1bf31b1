"""The fused LoRA layer (CCLoRA), and the decision at which level it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from modellink_lora.adapters.fused_functions import ColumnBordered, RowBordered, Unbordered
from modellink_lora.adapters.lora import LoraLinear, NormedLoraLinear, norms_its_input
from modellink_lora.device import Device
from modellink_lora.device.lora_ops import Mask
from modellink_lora.models.recompute import recipe_of
from modellink_lora.parallel import overlap

LEVELS = ("L0", "L1", "L2")
ALIGNMENT = 8  # columns: rows of 16-bit numbers then begin at multiples of 16 bytes, which fast kernels ask for


@dataclass(frozen=True)
class Fusion:
    """How a run wants its linears fused.

    Args:
        level: "auto" or one of LEVELS.
        chunks: of a linear, a function of its local tokens, see FusedLoraLinear.
        recompute_inputs: see FusedLoraLinear.
    """

    device: Device
    level: str = "auto"
    chunks: Callable[[torch.nn.Module], Callable[[int], int]] = lambda base: lambda rows: 1
    recompute_inputs: bool = True


@dataclass(frozen=True)
class Decision:
    """At which level one linear runs, and why."""

    level: str
    owned: int  # collectives of the adapter's own, for each micro-batch
    reason: str


def decide(
    base: torch.nn.Module, *, dropout: float, wanted: str = "auto", fused_collectives: bool = False
) -> Decision:  # fmt: skip
    """The level for `base`, a linear that `obstacle` lets pass.

    Args:
        wanted: "auto", or the level that the user asked for.
        fused_collectives: the device multiplies and communicates in one operator, which takes one matrix only.
    """
    group: Any = base.tp_group
    column, t = isinstance(base, ColumnParallelLinear), group.size()
    if t == 1:
        return Decision("L0", 0, "one tensor rank: nothing is sent")
    if not base.sequence_parallel:
        return Decision("L0", 0, "no sequence parallelism: added before the all-reduce")
    owned = {"L0": 1 if column else 0, "L1": 0, "L2": 0}
    if wanted == "L2" and not column and dropout:
        return Decision("L1", 0, "--lora-fusion-level L2 needs x itself below W; dropout changes what lora_A sees")
    if wanted != "auto":
        note = ": a reduce-scatter of r columns, in backward" if owned[wanted] else ""
        return Decision(wanted, owned[wanted], f"--lora-fusion-level{note}")
    if column:
        return Decision("L2", 0, "rides in gather and reduce-scatter; one product each way")
    if fused_collectives and not dropout:
        return Decision("L2", 0, "one matrix, as the device's fused operators want it")
    if base.weight.dtype.itemsize == 2:
        return Decision("L0", 0, "added before the reduce-scatter: small 16-bit updates survive")
    return Decision("L1" if dropout else "L2", 0, "rides in reduce-scatter and gather")


def obstacle(base: torch.nn.Module) -> str:
    """Why the fused layer cannot stand in for LoraLinear on `base`; empty if it can."""
    if type(base) not in (ColumnParallelLinear, RowParallelLinear):
        return f"{type(base).__name__} is not a linear of megatron-core itself"
    config: Any = base.config
    checks = {
        "it has no weight of its own": base.weight is None,
        "its weight or bias is trained": any(p.requires_grad for p in base.parameters()),
        "it is an expert": base.is_expert,
        "its gradient is reduced elsewhere": getattr(base, "disable_grad_reduce", False),
        "it cuts its input itself": not getattr(base, "input_is_parallel", True),
        "its activations are offloaded to the host": bool(config.cpu_offloading),
        "its weight gradient is deferred": bool(config.defer_embedding_wgrad_compute),
    }
    return next((reason for reason, holds in checks.items() if holds), "")


def make_layer(base: Any, fusion: Fusion | None, **settings: Any) -> LoraLinear:
    """The plain layer, or the fused one at the level decided for `base` where it can stand in.

    Args:
        settings: lora_A, lora_B, scaling, dropout.
    """
    if norms_its_input(base):
        return NormedLoraLinear(base, **settings)
    if fusion is None or obstacle(base):
        return LoraLinear(base, **settings)
    decision = decide(
        base, dropout=settings["dropout"], wanted=fusion.level, fused_collectives=fusion.device.fused_collectives
    )
    layer = FusedLoraLinear(
        base, device=fusion.device, level=decision.level, chunks=fusion.chunks(base),
        recompute_inputs=fusion.recompute_inputs, **settings,
    )  # fmt: skip
    layer.decision = decision
    return layer


FUSION_TITLE = "CCLoRA: collectives are those a micro-batch adds to the frozen linear's own"
FUSION_HEADER = ("module", "layers", "level", "own collectives", "chunks", "why")


def fusion_rows(layers: Mapping[str, LoraLinear], rows: int) -> tuple[list[tuple[str, ...]], list[str]]:
    """For each fused layer FUSION_HEADER without the number of layers, and a line for each on the plain path.

    Args:
        layers: by global module name.
        rows: local tokens for which chunks are told.
    """
    fused: list[tuple[str, ...]] = []
    fallen = []
    for name, layer in layers.items():
        if isinstance(layer, FusedLoraLinear):
            found = layer.decision
            sent = str(layer.chunks(rows)) if layer.ranks > 1 else "-"
            fused.append((name.rpartition(".")[2], found.level, str(found.owned), sent, found.reason))
        else:
            fallen.append(f"warning: {name} runs on the plain LoRA path: {obstacle(layer.base_layer)}")
    return fused, fallen


class FusedLoraLinear(LoraLinear):
    """LoraLinear with the frozen linear and the adapter in one autograd function (adapters/fused_functions.py).

    Args:
        level: "L0", "L1" or "L2", see `decide`. L2 moves the base's weight into a wider storage.
        chunks: into how many chunks that many local tokens are cut, to multiply one while another is sent.
        recompute_inputs: keep what x is computed from (models/recompute.py) instead of x.
    """

    decision: Decision

    def __init__(
        self,
        base: ColumnParallelLinear | RowParallelLinear,
        *,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        dropout: float = 0.0,
        device: Device,
        level: str = "L0",
        chunks: Callable[[int], int] = lambda rows: 1,
        recompute_inputs: bool = False,
    ) -> None:
        super().__init__(base, lora_A=lora_A, lora_B=lora_B, scaling=scaling, dropout=dropout)
        assert level in LEVELS and not (level == "L2" and dropout and not self.is_column), "see decide"
        self.device, self.level, self.chunks, self.recompute_inputs = device, level, chunks, recompute_inputs
        self.input_is_constant = False  # of a model's first linear: nothing reads the gradient of its input
        self.ranks = self.tp_group.size()
        self.sequence_parallel = self.sequence_parallel and self.ranks > 1
        assert level == "L0" or self.sequence_parallel or self.ranks == 1, "borders ride in gathers and reduce-scatters"
        bordered = {True: ColumnBordered, False: RowBordered}[self.is_column]
        self._function: Any = Unbordered if level == "L0" else bordered
        self.border = -(-len(lora_A) // ALIGNMENT) * ALIGNMENT
        self.wide = self._widen() if level == "L2" else None
        # in every case, not only under sequence parallelism, a rank's gradient of the factor that all hold is its share
        whole = self.lora_A if self.is_column else self.lora_B
        whole.partial_over_tensor_ranks = self.ranks > 1  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """[s(/t), b, i] or [n, i] -> the base's (output, bias), output [s(/t), b, o] or [n, o]."""
        base = self.base_layer
        if not self.enabled:
            return base(x)
        recipe = recipe_of(x) if self.recompute_inputs else None
        output = self._function.apply(x, self.lora_A, self.lora_B, self, recipe)
        if self.is_column and base.gather_output:
            output = gather_from_tensor_model_parallel_region(output, group=self.tp_group)
        return output, base.bias if base.skip_bias_add else None

    # ---- what the functions ask for

    @property
    def scale(self) -> float:
        """Of the adapter's share: the kept part of a thinned input counts for all of it."""
        thinned = self.training and self.dropout.p > 0
        return self.scaling / (1 - self.dropout.p) if thinned else self.scaling

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [r, i], B [o, r] in the dtype of the base, in which all products are made."""
        dtype = self.base_layer.weight.dtype
        return self.lora_A.detach().to(dtype), self.lora_B.detach().to(dtype)

    def mask(self, x: Tensor, *, whole: bool = False) -> Mask | None:
        """Of the dropout on x [s, b, i] or [n, i]; `whole`: on x gathered from all ranks."""
        return self.dropout.mask(x, ranks=self.ranks if whole else 1)

    def add_bias(self, output: Tensor) -> None:
        base = self.base_layer
        if base.bias is not None and not base.skip_bias_add:
            output += base.bias

    def leading(self, shape: torch.Size) -> list[int]:
        """The output's dimensions but the last, from the input's shape."""
        first, *rest = shape[:-1]
        if self.sequence_parallel:
            first = first * self.ranks if self.is_column else first // self.ranks
        return [first, *rest]

    def leave(
        self, rows_of: Tensor, width: int, produce: Callable[[slice, Tensor], None], *, reduces: bool
    ) -> Tensor:  # fmt: skip
        """A product [n or T, width] with one row for each of `rows_of`, summed over ranks if `reduces`."""
        rows = len(rows_of)
        if reduces and self.sequence_parallel:
            shape = (rows // self.ranks, width)
            return overlap.scatter(rows_of, shape, self.tp_group, self.chunks(shape[0]), produce)
        if reduces and self.ranks > 1:
            return overlap.reduce(rows_of, (rows, width), self.tp_group, self.chunks(rows), produce)
        out = rows_of.new_empty(rows, width)
        produce(slice(0, rows), out[None])
        return out

    def needs_input_grad(self, ctx: Any) -> bool:
        return ctx.needs_input_grad[0] and not self.input_is_constant

    def refreshed_border(self, factor: Tensor) -> Tensor | None:
        """L2: [W | B] or [W ; A] with the factor as it is now; every forward pass copies it, so it is never stale."""
        if self.wide is not None:
            weight, r = self.base_layer.weight, len(self.lora_A)
            border = self.wide[:, weight.shape[1] :] if self.is_column else self.wide[len(weight) :]
            (border[:, :r] if self.is_column else border[:r]).copy_(factor)
        return self.wide

    def _widen(self) -> Tensor:
        """Move W into a storage with a border of zeros; the base's weight becomes a view of it."""
        weight = self.base_layer.weight
        out, inputs = weight.shape
        shape = (out, inputs + self.border) if self.is_column else (out + self.border, inputs)
        wide = weight.new_zeros(shape).detach()
        inner = wide[:, :inputs] if self.is_column else wide[:out]
        with torch.no_grad():
            inner.copy_(weight)
        weight.data = inner
        return wide
