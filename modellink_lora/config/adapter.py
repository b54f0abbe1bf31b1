"""What is adapted and how strongly: the LoRA hyper-parameters, stored with every adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from modellink_lora.config.flag import Range, check_number, check_ranges, flag


@dataclass(frozen=True)
class LoraConfig:
    """LoRA (Hu et al. 2021, arXiv:2106.09685): W' = W + scaling * B A"""

    r: int = flag(16, "LoRA rank", name="lora-r", at_least=1)
    alpha: float = flag(32.0, "LoRA alpha; scaling is alpha / r", name="lora-alpha", above=0)
    dropout: float = flag(0.0, "dropout on the adapter's input", name="lora-dropout", at_least=0, below=1)
    target_modules: tuple[str, ...] = flag(
        (),
        "linear_qkv linear_proj linear_fc1 linear_fc2, or by their legacy names "
        "query_key_value dense dense_h_to_4h dense_4h_to_h",
        name="lora-target-modules",
    )
    use_rslora: bool = flag(False, "scaling alpha / sqrt(r) (arXiv:2312.03732)", name="use-rslora")
    dtype: str | None = flag(
        None, "dtype of lora_A and lora_B; default the base's", name="lora-dtype", choices=("fp32", "bf16", "fp16")
    )
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_ranges(self)
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        for name, rank in self.rank_pattern.items():
            check_number(f"rank_pattern[{name}]", rank, int, Range(at_least=1))
        for name, alpha in self.alpha_pattern.items():
            check_number(f"alpha_pattern[{name}]", alpha, float, Range(above=0))

    def rank_of(self, module: str) -> int:
        """Rank of the adapter on `module`, a global module path or its last part."""
        return int(_lookup(self.rank_pattern, module, self.r))

    def alpha_of(self, module: str) -> float:
        """Alpha of the adapter on `module`."""
        return float(_lookup(self.alpha_pattern, module, self.alpha))

    def scaling_of(self, module: str) -> float:
        """alpha / r of `module`, or alpha / sqrt(r) under rank-stabilised LoRA."""
        r, alpha = self.rank_of(module), self.alpha_of(module)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r


def _lookup(pattern: dict[str, float] | dict[str, int], module: str, default: float) -> float:
    """Value of the longest pattern key that equals `module` or ends it at a dot."""
    matches = [key for key in pattern if module == key or module.endswith("." + key)]
    return pattern[max(matches, key=len)] if matches else default
