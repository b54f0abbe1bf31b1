"""The LoRA layer on a tensor-parallel linear, plain path: Y = X W^T + b + scaling * dropout(X) A^T B^T.

Letters: s sequence, b batch, i inputs, o outputs, r rank, t tensor parallel size; SP sequence parallel.

column linear (outputs cut):  A [r, i] replicated, B [o/t, r] cut with the base.
    SP:     X [s/t, b, i] -> X A^T [s/t, b, r], all-gather -> [s, b, r] -> times B^T. Backward reduce-scatters, so the
            gradient of A holds this rank's tokens only and is summed over the TP group once per step.
    no SP:  X [s, b, i] is replicated; backward all-reduces the gradient of X A^T, so A's gradient is whole.
row linear (inputs cut):      A [r, i/t] cut with the base, B [o, r] replicated.
    SP:     X [s, b, i/t] -> X A^T is a partial sum, reduce-scatter -> [s/t, b, r] -> times B^T. The gradient of B
            holds this rank's tokens only and is summed over the TP group once per step.
    no SP:  all-reduce of the partial sum; every rank sees all tokens, so B's gradient is whole.
Only r-wide tensors are communicated.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from modellink_lora.models.dropout import Dropout


class LoraLinear(torch.nn.Module):
    """A frozen parallel linear `base_layer` with trained `lora_A` and `lora_B`; output as the base's, plus the adapter.

    Args:
        base: the linear to adapt, of megatron-core or Transformer Engine; its parameters are not changed here.
        lora_A, lora_B: this rank's shards, in the adapter's dtype.
        scaling: alpha / r.
        dropout: on the adapter's input.
    """

    def __init__(
        self,
        base: Any,
        *,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.base_layer = base
        self.is_column = _is_column(base)
        self.sequence_parallel = bool(base.sequence_parallel)
        self.tp_group = base.tp_group
        self.scaling, self.enabled = scaling, True
        cut = "features" if not self.is_column else "positions" if self.sequence_parallel else None
        self.dropout = Dropout(dropout, rank=self.tp_group.rank(), cut=cut)
        self.lora_A = torch.nn.Parameter(lora_A)
        self.lora_B = torch.nn.Parameter(lora_B)
        sharded, whole = (self.lora_B, self.lora_A) if self.is_column else (self.lora_A, self.lora_B)
        set_tensor_model_parallel_attributes(sharded, True, 0 if self.is_column else 1, 1)
        # Under SP each rank's gradient of the replicated factor covers its own tokens only: training/optimizer.py sums
        # those marked so over the TP group, once for each global batch.
        whole.partial_over_tensor_ranks = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        """[s(/t), b, i] -> the base's (output, bias); the bias stays apart where the base leaves it apart."""
        output, bias = self.base_layer(x, *args, **kwargs)
        if not self.enabled:
            return output, bias
        return output + self.delta(x).to(output.dtype), bias

    def delta(self, x: Tensor) -> Tensor:
        """The adapter's share of the output, in the adapter's dtype."""
        low = F.linear(self.dropout(x).to(self.lora_A.dtype), self.lora_A)  # [s(/t), b, r]
        group = self.tp_group
        if self.is_column and self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True, group=group)
        elif self.is_column:
            low = copy_to_tensor_model_parallel_region(low, group=group)
        elif self.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low, group=group)
        else:
            low = reduce_from_tensor_model_parallel_region(low, group=group)
        return F.linear(low * self.scaling, self.lora_B)  # [s(/t), b, o(/t)]


class NormedLoraLinear(LoraLinear):
    """LoraLinear on a linear that norms its input itself, as Transformer Engine's do; the adapter reads what it normed.

    The base is asked to give that back beside its output. Under SP it gives this rank's tokens, as `delta` wants them:
    r columns are gathered instead of the whole input, and the base reduces its own input gradient before ours is added.
    """

    def __init__(self, base: Any, **settings: Any) -> None:
        super().__init__(base, **settings)
        base.return_layernorm_output, base.return_layernorm_output_gathered = True, False

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        """[s(/t), b, i] before the norm -> the base's (output, bias)"""
        output, bias, *normed = self.base_layer(x, *args, **kwargs)
        if not normed:  # megatron-core's wrapper: ((output, normed), None) where no bias stands apart
            output, *normed = output
        if not self.enabled:
            return output, bias
        return output + self.delta(normed[0]).to(output.dtype), bias


def _is_column(linear: Any) -> bool:
    mode = getattr(linear, "parallel_mode", None)  # Transformer Engine's word for it
    return mode == "column" if mode else isinstance(linear, ColumnParallelLinear)


def norms_its_input(linear: Any) -> bool:
    return hasattr(linear, "layer_norm_weight")
