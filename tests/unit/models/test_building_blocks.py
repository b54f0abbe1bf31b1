"""What families need beyond Llama, each against its formula: norms, activations, ALiBi, capped scores, branches."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modellink_lora.config.model import ModelConfig
from modellink_lora.device import get_device
from modellink_lora.device.base import softmax_attention
from modellink_lora.models import alibi
from modellink_lora.models.dropout import ResidualAdd
from modellink_lora.models.recompute import recipe_of
from modellink_lora.models.rope import inverse_frequencies
from modellink_lora.models.spec import Gelu, LayerNorm, RMSNorm

DEVICE = get_device("cpu")
MEGATRON: Any = SimpleNamespace(params_dtype=torch.float64, sequence_parallel=False)


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_one_more_is_added_to_the_weight_in_fp32_and_the_product_rounded_once(dtype: torch.dtype) -> None:
    x, weight = random(5, 8, dtype=dtype), random(8, dtype=dtype, seed=1)
    wide = torch.promote_types(dtype, torch.float32)
    normed = x.to(wide) * torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(DEVICE.rms_norm(x, weight, 1e-6, one_more=True), (normed * (1 + weight.to(wide))).to(dtype))


def test_the_gradient_of_the_norm_with_one_more() -> None:
    x, weight = random(3, 8).requires_grad_(), random(8, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: DEVICE.rms_norm(a, b, 1e-6, one_more=True), (x, weight))


@pytest.mark.parametrize("make", [
    lambda: RMSNorm(MEGATRON, 8, 1e-5, device=DEVICE, one_more=True),
    lambda: LayerNorm(MEGATRON, 8, 1e-5, device=DEVICE),
    lambda: Gelu(MEGATRON, gated=True, tanh=True),
    lambda: Gelu(MEGATRON, gated=False, tanh=False),
])  # fmt: skip
def test_each_says_how_its_output_is_computed_again(make: Any) -> None:
    module = make()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    out = module(random(4, 8).requires_grad_())
    recipe = recipe_of(out)
    assert recipe is not None and torch.equal(recipe.function(*recipe.inputs), out)


def test_the_gate_is_the_first_half() -> None:
    x = random(4, 8)
    found = Gelu(MEGATRON, gated=True, tanh=True)(x)
    assert torch.equal(found, F.gelu(x[:, :4], approximate="tanh") * x[:, 4:])
    assert torch.equal(Gelu(MEGATRON, gated=False, tanh=False)(x), F.gelu(x))


def test_alibi_slopes_of_a_power_of_two_and_in_between() -> None:
    assert alibi.slopes(4).tolist() == [2**-2, 2**-4, 2**-6, 2**-8]
    found = alibi.slopes(6)
    assert found[:4].tolist() == alibi.slopes(4).tolist()
    assert found[4:].tolist() == pytest.approx([2**-1, 2**-3]), "every second one of eight heads"


def test_scores_are_capped_and_then_lean_towards_near_keys() -> None:
    q, k, v = (random(1, 2, 5, 4, seed=seed, dtype=torch.float32) for seed in range(3))
    slopes = alibi.slopes(2)
    found = DEVICE.attention(q, k, v, causal=True, scale=0.7, slopes=slopes, softcap=0.9)
    for head in range(2):
        for i in range(5):
            scores = torch.stack([
                0.9 * torch.tanh(0.7 * q[0, head, i] @ k[0, head, j] / 0.9) - slopes[head] * (i - j)
                for j in range(i + 1)
            ])  # fmt: skip
            assert torch.allclose(found[0, head, i], scores.softmax(0) @ v[0, head, : i + 1], atol=1e-6)


def test_without_cap_and_slopes_attention_is_unchanged() -> None:
    q, k, v = (random(1, 2, 5, 4, seed=seed, dtype=torch.float32) for seed in range(3))
    plain = softmax_attention(q, k, v, causal=True, scale=0.5)
    assert torch.allclose(DEVICE.attention(q, k, v, causal=True, scale=0.5), plain, atol=1e-6)


def test_a_branch_is_normed_with_its_bias_and_scaled() -> None:
    add = ResidualAdd(0.0, rank=0, cut=None, scale=0.5)
    x, bias, residual = random(4, 8), random(8, seed=1), random(4, 8, seed=2)
    assert torch.equal(add(False, False)((x, bias), residual, 0.0), residual + (x + bias) * 0.5)
    norm = LayerNorm(MEGATRON, 8, 1e-5, device=DEVICE)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    add.behind(norm)
    assert torch.equal(add(False, False)((x, bias), residual, 0.0), residual + norm(x + bias) * 0.5)
    assert not list(add.parameters()), "the norm stays a module of its layer"


def test_half_rotated_heads_have_half_the_frequencies() -> None:
    config = ModelConfig(
        num_layers=1, hidden_size=64, num_attention_heads=4, max_position_embeddings=8, vocab_size=9,
        normalization="RMSNorm", swiglu=True, position_embedding_type="rope", rotary_percent=0.5,
    )  # fmt: skip
    assert inverse_frequencies(config).tolist() == pytest.approx([10000 ** -(i / 4) for i in range(4)])
    assert math.isclose(config.residual_scale, 1.0)
