"""Which linears an adapter covers, with what shapes: one answer for every layout, computed without a model. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modellink_lora.checkpoint.names import TARGETS, mcore_target
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.family import Family
from modellink_lora.models.layouts import Layout, lora_layouts
from modellink_lora.models.shapes import full_shape

_OF_EXPERTS = ("linear_fc1", "linear_fc2")


@dataclass(frozen=True)
class AdaptedLinear:
    """One adapted linear in full, unsharded terms: lora_A [r, in_features], lora_B [out_features, r]."""

    name: str  # global, e.g. decoder.layers.0.mlp.linear_fc1
    in_features: int
    out_features: int
    r: int
    scaling: float
    a_layout: Layout
    b_layout: Layout

    @property
    def parameters(self) -> int:
        return self.r * (self.in_features + self.out_features)


def resolve_targets(given: Sequence[str]) -> tuple[str, ...]:
    """mcore names of `--lora-target-modules` in either spelling, in the table's order. Raises UserError for others."""
    choices = f"{' '.join(TARGETS)} (legacy spelling: {' '.join(TARGETS.values())})"
    if not given:
        raise UserError(f"--lora-target-modules is missing; this program trains adapters only. Name some of: {choices}")
    unknown = [name for name in given if name not in TARGETS and name not in TARGETS.values()]
    if unknown:
        raise UserError(f"--lora-target-modules {' '.join(unknown)} matches no layer; this model has {choices}")
    wanted = {mcore_target(name) for name in given}
    return tuple(name for name in TARGETS if name in wanted)


def adapted_linears(family: Family, config: ModelConfig, lora: LoraConfig) -> list[AdaptedLinear]:
    """Every linear that `lora` adapts, layer by layer. Targets must be resolved."""
    if config.num_experts and (inside := [name for name in lora.target_modules if name in _OF_EXPERTS]):
        raise UserError(
            f"--lora-target-modules {' '.join(inside)}: adapters inside experts are not trained; this model has "
            f"{config.num_experts} experts a layer: give linear_qkv linear_proj"
        )
    result = []
    for spec in family.tensors(config):
        module, _, leaf = spec.name.rpartition(".")
        if leaf != "weight" or module.rsplit(".", 1)[-1] not in lora.target_modules:
            continue
        out_features, in_features = full_shape(spec.name, config)
        a_layout, b_layout = lora_layouts(spec.layout)
        result.append(
            AdaptedLinear(
                module, in_features, out_features, lora.rank_of(module), lora.scaling_of(module), a_layout, b_layout
            )
        )
    for pattern in (lora.rank_pattern, lora.alpha_pattern):
        unused = [key for key in pattern if not any(f".{x.name}".endswith(f".{key}") for x in result)]
        if unused:
            raise UserError(f"rank_pattern/alpha_pattern {' '.join(unused)} matches no adapted linear")
    return result


def trainable_table(linears: Sequence[AdaptedLinear], config: ModelConfig) -> list[tuple[str, ...]]:
    """Rows (module, count, lora_A, lora_B, sharding over TP, parameters) with a total, over all of TP and PP."""
    rows: list[tuple[str, ...]] = []
    kinds: dict[tuple[str, int], list[AdaptedLinear]] = {}
    for linear in linears:
        kinds.setdefault((linear.name.rsplit(".", 1)[-1], linear.r), []).append(linear)
    for (kind, r), group in kinds.items():
        one = group[0]
        column = kind in ("linear_qkv", "linear_fc1")
        sharding = "A replicated, B rows cut" if column else "A columns cut, B replicated"
        rows.append(
            (kind, str(len(group)), f"[{r}, {one.in_features}]", f"[{one.out_features}, {r}]", sharding,
             f"{sum(x.parameters for x in group):,}")
        )  # fmt: skip
    total = sum(linear.parameters for linear in linears)
    share = 100 * total / (total + config.parameter_count())
    rows.append(("trainable", str(len(linears)), "", "", f"{share:.4f} % of all", f"{total:,}"))
    return rows
