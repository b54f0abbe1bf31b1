"""RMSNorm and SwiGLU equal their composite expressions, keep their input only, and say how to be computed again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.counters import Saved
from modellink_lora.device.cpu import CpuDevice
from modellink_lora.models.recompute import recipe_of, remember
from modellink_lora.models.spec import RMSNorm, Swiglu

S, B, H, EPS = 12, 2, 40, 1e-5
DEVICE = CpuDevice()
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers' Llama computes it; in fp64 with statistics in fp64."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * normed.to(x.dtype)


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def inputs(dtype: torch.dtype, width: int, *, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Tokens whose sizes differ by a lot, and a weight that is not all ones."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 2, S * B, dtype=torch.float64).view(S, B, 1)
    x = torch.randn(S, B, width, generator=generator, dtype=torch.float64) * sizes
    weight = 1 + torch.randn(width, generator=generator, dtype=torch.float64) / 4
    return x.to(dtype), weight.to(dtype)


def gradients(function: Callable[..., Tensor], *arguments: Tensor, grad: torch.dtype | None = None) -> list[Tensor]:
    """Of `arguments`, for a gradient of the output that `grad` can hold exactly."""
    leaves = [argument.detach().requires_grad_() for argument in arguments]
    out = function(*leaves)
    generator = torch.Generator().manual_seed(2)
    given = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(grad or out.dtype)
    out.backward(given.to(out.dtype))
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def off(found: Tensor, exact: Tensor) -> float:
    """Largest error of a row, relative to the largest number of the row."""
    return ((found.double() - exact).abs().amax(-1) / exact.abs().amax(-1)).max().item()


def saved_bytes(function: Callable[..., Tensor], *arguments: Tensor, own: tuple[Tensor, ...] = ()) -> int:
    with Saved() as saved:
        out = function(*arguments)
    assert out.requires_grad
    return saved.bytes(without=own)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return DEVICE.rms_norm(x, weight, EPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [H, H + 3])
def test_the_norm_has_the_bits_of_the_composite_expression(dtype: torch.dtype, width: int) -> None:
    x, weight = inputs(dtype, width)
    assert torch.equal(norm(x, weight), rms_norm(x, weight))
    strided = torch.cat([x, x], -1)[..., :width]
    assert torch.equal(norm(strided, weight), rms_norm(x, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_the_norm_are_exact_up_to_one_rounding(dtype: torch.dtype) -> None:
    x, weight = inputs(dtype, H)
    exact = gradients(rms_norm, x.double(), weight.double(), grad=dtype)
    ours, composite = gradients(norm, x, weight), gradients(rms_norm, x, weight)
    assert off(ours[0], exact[0]) <= ROUNDING[dtype]
    if dtype.itemsize < 4:
        assert off(ours[0], exact[0]) < off(composite[0], exact[0]), "autograd's own rounds twice"
    assert off(ours[1], exact[1]) <= 4 * ROUNDING[dtype]
    assert ours[0].dtype == ours[1].dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_has_the_bits_of_the_composite_expression_in_both_directions(dtype: torch.dtype) -> None:
    x, _ = inputs(dtype, 2 * H)
    assert torch.equal(DEVICE.swiglu(x), swiglu(x))
    assert torch.equal(gradients(DEVICE.swiglu, x)[0], gradients(swiglu, x)[0])


def test_both_agree_with_finite_differences() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 2, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(8, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x, weight))
    assert torch.autograd.gradcheck(DEVICE.swiglu, (x,))


def test_either_gradient_of_the_norm_comes_alone_where_the_other_is_not_asked_for() -> None:
    x, weight = inputs(torch.float32, H)
    both = gradients(norm, x, weight)
    assert torch.equal(gradients(lambda x: norm(x, weight), x)[0], both[0])
    assert torch.equal(gradients(lambda weight: norm(x, weight), weight)[0], both[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_frozen_norm_keeps_its_input_and_a_number_a_row(dtype: torch.dtype) -> None:
    x, weight = inputs(dtype, H)
    x.requires_grad_()
    assert saved_bytes(norm, x, weight, own=(weight,)) == x.nbytes + 4 * S * B


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swiglu_keeps_its_input_only(dtype: torch.dtype) -> None:
    x = inputs(dtype, 2 * H)[0].requires_grad_()
    assert saved_bytes(DEVICE.swiglu, x) == x.nbytes
    assert saved_bytes(swiglu, x) == 1.5 * x.nbytes, "the composite keeps silu(gate) as well"


def modules(dtype: torch.dtype) -> list[tuple[torch.nn.Module, Tensor]]:
    config = type("Config", (), {"params_dtype": dtype, "sequence_parallel": False})()
    x, weight = inputs(dtype, H)
    layer = RMSNorm(config, H, EPS, device=DEVICE)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return [(layer, x), (Swiglu(config, device=DEVICE), x)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layers_recipe_gives_its_output_again_bit_for_bit_from_what_is_kept_anyway(dtype: torch.dtype) -> None:
    for module, x in modules(dtype):
        x = x.requires_grad_()
        out = module(x)
        recipe = recipe_of(out)
        assert recipe is not None and len(recipe.inputs) == 1 and recipe.inputs[0] is x
        with torch.no_grad():
            assert torch.equal(recipe.function(*recipe.inputs), out)


def test_without_a_gradient_there_is_no_recipe_for_nobody_keeps_its_inputs() -> None:
    for module, x in modules(torch.float32):
        assert recipe_of(module(x)) is None
        with torch.no_grad():
            assert recipe_of(module(x.clone().requires_grad_())) is None


def test_views_and_copies_have_no_recipe() -> None:
    x = torch.ones(3, requires_grad=True)
    out = remember(x * 2, torch.mul, x, torch.tensor(2.0))
    assert recipe_of(out) is not None
    assert recipe_of(out[:2]) is recipe_of(out.clone()) is recipe_of(out.view(-1)) is recipe_of(out.detach()) is None
