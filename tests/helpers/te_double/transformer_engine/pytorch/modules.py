"""Linear, LayerNormLinear, LayerNorm and RMSNorm: arguments, attributes, returns and roundings of the real ones.

What the double keeps to, of Transformer Engine 2.x:
* `tp_group`, `parallel_mode`, and `sequence_parallel`, which is true only with several tensor ranks, are attributes.
* A norm computes in fp32 and rounds once, after its weight; with zero_centered_gamma the factor is 1 + weight.
* LayerNormLinear reads return_layernorm_output and return_layernorm_output_gathered at every call, so they may be set
  after it was built. The normed input comes last in what it returns. Not gathered, it is this rank's, and its gradient
  is added after the linear's own input gradient was reduced over ranks.
* With return_bias the bias is not applied but returned; without a bias it is an empty tensor.
* Inputs have the parameters' dtype, as outside of autocast.
* `_extra_state` stands in a state dict, empty without fp8.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_engine.pytorch.collectives import Copy, Gather, Scatter, Sum


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool, rms: bool) -> Tensor:
    wide = x.float()
    factor = weight.float() + 1 if zero_centered else weight.float()
    if rms:
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * factor).to(x.dtype)
    assert bias is not None
    return F.layer_norm(wide, weight.shape, factor, bias.float(), eps).to(x.dtype)


def _parameter(*shape: int, dtype: Any, device: Any) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(*shape, dtype=dtype, device=device))


class _Norm(torch.nn.Module):
    rms: bool

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, sequence_parallel: bool = False, zero_centered_gamma: bool = False,
        params_dtype: Any = None, device: Any = "cuda",
    ) -> None:  # fmt: skip
        super().__init__()
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        self.weight = _parameter(hidden_size, dtype=params_dtype, device=device)
        self.bias = None if self.rms else _parameter(hidden_size, dtype=params_dtype, device=device)
        for parameter in self.parameters():
            parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return _norm(x, self.weight, self.bias, self.eps, self.zero_centered_gamma, self.rms)


class RMSNorm(_Norm):
    rms = True


class LayerNorm(_Norm):
    rms = False


class _Base(torch.nn.Module):
    """What both linears have."""

    def _make(
        self, in_features: int, out_features: int, *, sequence_parallel: bool, tp_group: Any, tp_size: int,
        parallel_mode: str | None, bias: bool, return_bias: bool, params_dtype: Any, device: Any, init_method: Any,
        fuse_wgrad_accumulation: bool,
    ) -> None:  # fmt: skip
        assert parallel_mode in (None, "column", "row") and not fuse_wgrad_accumulation
        self.tp_group, self.tp_size = tp_group, tp_group.size() if tp_group is not None else tp_size
        self.parallel_mode = parallel_mode
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        out = out_features // self.tp_size if parallel_mode == "column" else out_features
        inputs = in_features // self.tp_size if parallel_mode == "row" else in_features
        self.in_features, self.out_features = inputs, out
        self.use_bias, self.return_bias, self.apply_bias = bias, return_bias, bias and not return_bias
        self.weight = _parameter(out, inputs, dtype=params_dtype, device=device)
        init_method(self.weight)
        if bias:
            self.bias = _parameter(out, dtype=params_dtype, device=device)
        else:
            self.bias = torch.empty(0, dtype=params_dtype, device=device)

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None: ...

    def _enter(self, x: Tensor) -> Tensor:
        for name, parameter in self.named_parameters():
            assert x.dtype == parameter.dtype, f"{name} is {parameter.dtype}, the input {x.dtype}"
        return x.contiguous()

    def _product(self, x: Tensor) -> Tensor:
        """Of an input that is there whole (column) or as this rank's columns (row)."""
        inner = self.bias if self.apply_bias and self.parallel_mode != "row" else None
        y = F.linear(x, self.weight, inner)
        if self.parallel_mode == "row" and self.tp_size > 1:
            y = Scatter.apply(y, self.tp_group) if self.sequence_parallel else Sum.apply(y, self.tp_group)
        return y + self.bias if self.apply_bias and self.parallel_mode == "row" else y

    def _arrive(self, x: Tensor) -> Tensor:
        """The input of a column linear as its product wants it."""
        if self.parallel_mode != "column" or self.tp_size == 1:
            return x
        return Gather.apply(x, self.tp_group) if self.sequence_parallel else Copy.apply(x, self.tp_group)


class Linear(_Base):
    def __init__(
        self, in_features: int, out_features: int, sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False, tp_group: Any = None, tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None, init_method: Any = None, bias: bool = True, return_bias: bool = False,
        params_dtype: Any = None, parallel_mode: str | None = None, device: Any = "cuda",
    ) -> None:  # fmt: skip
        super().__init__()
        self._make(
            in_features, out_features, sequence_parallel=sequence_parallel, tp_group=tp_group, tp_size=tp_size,
            parallel_mode=parallel_mode, bias=bias, return_bias=return_bias, params_dtype=params_dtype, device=device,
            init_method=init_method, fuse_wgrad_accumulation=fuse_wgrad_accumulation,
        )  # fmt: skip

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        y = self._product(self._arrive(self._enter(x)))
        return (y, self.bias) if self.return_bias else y


class LayerNormLinear(_Base):
    def __init__(
        self, in_features: int, out_features: int, eps: float = 1e-5, sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False, tp_group: Any = None, tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        init_method: Any = None, bias: bool = True, normalization: str = "LayerNorm", return_bias: bool = False,
        params_dtype: Any = None, parallel_mode: str | None = None, return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False, zero_centered_gamma: bool = False, device: Any = "cuda",
    ) -> None:  # fmt: skip
        super().__init__()
        assert parallel_mode != "row"
        self.eps, self.normalization, self.zero_centered_gamma = eps, normalization, zero_centered_gamma
        self.layer_norm_weight = _parameter(in_features, dtype=params_dtype, device=device)
        self.layer_norm_bias = None
        if normalization != "RMSNorm":
            self.layer_norm_bias = _parameter(in_features, dtype=params_dtype, device=device)
        self._make(
            in_features, out_features, sequence_parallel=sequence_parallel, tp_group=tp_group, tp_size=tp_size,
            parallel_mode=parallel_mode, bias=bias, return_bias=return_bias, params_dtype=params_dtype, device=device,
            init_method=init_method, fuse_wgrad_accumulation=fuse_wgrad_accumulation,
        )  # fmt: skip
        self.return_layernorm_output = return_layernorm_output
        self.return_layernorm_output_gathered = return_layernorm_output and return_layernorm_output_gathered

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        rms = self.normalization == "RMSNorm"
        normed = _norm(
            self._enter(x), self.layer_norm_weight, self.layer_norm_bias, self.eps, self.zero_centered_gamma, rms
        )
        arrived = self._arrive(normed)
        found: list[Tensor] = [self._product(arrived)]
        if self.return_bias:
            found.append(self.bias)
        if self.return_layernorm_output:
            found.append(arrived if self.return_layernorm_output_gathered and self.sequence_parallel else normed)
        return tuple(found) if len(found) > 1 else found[0]
