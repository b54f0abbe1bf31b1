"""What is adapted and how strongly: the LoRA hyper-parameters, stored with every adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from modellink_lora.config.errors import UserError
from modellink_lora.config.flag import flag


@dataclass(frozen=True)
class LoraConfig:
    """LoRA (Hu et al. 2021, arXiv:2106.09685): W' = W + scaling * B A"""

    r: int = flag(16, "LoRA rank", name="lora-r")
    alpha: float = flag(32.0, "LoRA alpha; scaling is alpha / r", name="lora-alpha")
    dropout: float = flag(0.0, "dropout on the adapter's input", name="lora-dropout")
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
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        for where, rank in [("--lora-r", self.r), *((f"rank_pattern[{k}]", v) for k, v in self.rank_pattern.items())]:
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise UserError(f"{where} {rank}: the rank must be a whole number of at least 1")
        alphas = [("--lora-alpha", self.alpha), *((f"alpha_pattern[{k}]", v) for k, v in self.alpha_pattern.items())]
        for where, alpha in alphas:
            if not math.isfinite(alpha) or alpha <= 0:
                raise UserError(f"{where} {alpha}: must be a positive number")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"--lora-dropout {self.dropout}: must be at least 0 and below 1")

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
