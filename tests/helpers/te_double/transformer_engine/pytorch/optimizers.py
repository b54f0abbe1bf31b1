"""FusedAdam's bookkeeping: moments by parameter, the number of steps in the group, from the first step on."""

from __future__ import annotations

from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, *, adam_w_mode: bool = True, capturable: bool = False,
    ) -> None:  # fmt: skip
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.capturable = capturable

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if "step" in group:
                group["step"] += 1
            else:
                group["step"] = torch.tensor([1], dtype=torch.int) if self.capturable else 1
            steps, (first, second) = int(group["step"]), group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["exp_avg"].lerp_(p.grad, 1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(p.grad, p.grad, value=1 - second)
                mean = state["exp_avg"] / (1 - first**steps)
                spread = (state["exp_avg_sq"] / (1 - second**steps)).sqrt_().add_(group["eps"])
                p.sub_(group["lr"] * (mean / spread + group["weight_decay"] * p))


class FusedSGD(torch.optim.SGD): ...
