"""The FLOP count of the log line against torch's own counter on a plain model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from modellink_lora.adapters.targets import adapted_linears
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.families import family_of
from modellink_lora.planning.flops import lora_step_flops

CONFIG = ModelConfig(
    num_layers=3, hidden_size=64, num_attention_heads=4, num_query_groups=2, kv_channels=32, ffn_hidden_size=96,
    max_position_embeddings=128, vocab_size=259, padded_vocab_size=384, normalization="RMSNorm", swiglu=True,
    position_embedding_type="rope", untie_embeddings_and_output_weights=True,
)  # fmt: skip
LENGTHS = [24, 40]


def counted(lora: LoraConfig) -> tuple[float, float]:
    """Multiply-adds times two of forward and backward: (matrices, attention scores and sums, unmasked)."""
    linears = {linear.name: linear for linear in adapted_linears(family_of("llama"), CONFIG, lora)}
    weights = {name: torch.randn(linear.out_features, linear.in_features) for name, linear in linears.items()}
    factors = {
        name: (
            torch.randn(x.r, x.in_features, requires_grad=True),
            torch.randn(x.out_features, x.r, requires_grad=True),
        )
        for name, x in linears.items()
    }
    head = torch.randn(CONFIG.vocab_size, CONFIG.hidden_size)

    def linear(name: str, x: Tensor) -> Tensor:
        a, b = factors[name]
        return F.linear(x, weights[name]) + F.linear(F.linear(x, a), b)

    def forward(x: Tensor) -> Tensor:
        tokens, d, groups = x.shape[0], CONFIG.kv_channels, CONFIG.num_query_groups
        for layer in range(CONFIG.num_layers):
            prefix = f"decoder.layers.{layer}."
            q, k, v = linear(prefix + "self_attention.linear_qkv", x).split(
                [CONFIG.query_width, CONFIG.kv_width, CONFIG.kv_width], dim=-1
            )
            q = q.view(tokens, CONFIG.num_attention_heads, d).transpose(0, 1)  # [n, s, d]
            k, v = (
                y.view(tokens, groups, d).transpose(0, 1).repeat_interleave(CONFIG.num_attention_heads // groups, 0)
                for y in (k, v)
            )
            out = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
            x = x + linear(prefix + "self_attention.linear_proj", out.transpose(0, 1).reshape(tokens, -1))
            gate, up = linear(prefix + "mlp.linear_fc1", x).chunk(2, dim=-1)
            x = x + linear(prefix + "mlp.linear_fc2", F.silu(gate) * up)
        return F.linear(x, head)

    with FlopCounterMode(display=False) as counter:
        for length in LENGTHS:
            forward(torch.randn(length, CONFIG.hidden_size, requires_grad=True)).sum().backward()
    by_operation = counter.get_flop_counts()["Global"]
    return float(by_operation[torch.ops.aten.mm]), float(by_operation[torch.ops.aten.bmm])


def test_the_step_costs_what_torch_counts_with_half_of_the_attention_masked() -> None:
    lora = LoraConfig(r=8, target_modules=("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"))
    trainable = sum(linear.parameters for linear in adapted_linears(family_of("llama"), CONFIG, lora))
    matrices, attention = counted(lora)
    assert attention > 0.01 * matrices, "attention must weigh enough to be noticed"
    assert lora_step_flops(CONFIG, trainable, LENGTHS) == pytest.approx(matrices + attention / 2, rel=1e-3)


def test_padding_of_the_vocabulary_and_of_samples_is_no_work() -> None:
    padded = dataclasses.replace(CONFIG, padded_vocab_size=4096)
    assert lora_step_flops(padded, 100, LENGTHS) == lora_step_flops(CONFIG, 100, LENGTHS)
    assert lora_step_flops(CONFIG, 100, [64]) > lora_step_flops(CONFIG, 100, [32, 32]), "attention is quadratic"


def test_of_a_mixture_the_experts_of_a_token_and_the_router_count() -> None:
    mixture = dataclasses.replace(CONFIG, num_experts=8, moe_router_topk=2, moe_ffn_hidden_size=48)
    router = 4 * CONFIG.num_layers * CONFIG.hidden_size * 8 * sum(LENGTHS)
    assert lora_step_flops(mixture, 100, LENGTHS) == lora_step_flops(CONFIG, 100, LENGTHS) + router
