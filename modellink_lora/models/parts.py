"""What an implementation of the transformer layer chooses: its linears, and where its norms are."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec


@dataclass(frozen=True)
class LayerParts:
    """Modules of one implementation.

    Attributes:
        norm: every norm that stands by itself.
        column: linear_qkv and linear_fc1.
        row: linear_proj and linear_fc2.
        norms_inside: `column` norms its own input, so no norm stands before it.
    """

    norm: ModuleSpec
    column: type
    row: type
    norms_inside: bool = False

    @property
    def norm_before(self) -> ModuleSpec | type:
        """What stands before linear_qkv and linear_fc1."""
        return IdentityOp if self.norms_inside else self.norm
