"""Arithmetic of a LoRA step, from dimensions alone. Pure."""

from __future__ import annotations

from modellink_lora.config.model import ModelConfig


def lora_step_flops(config: ModelConfig, trainable: int, lengths: list[int]) -> float:
    """Floating point operations of forward and backward over samples of these true lengths, padding not counted.

    A frozen matrix costs 2 per weight and token forward and 2 backward (input gradient only); an adapter 6, because
    its weight gradient is needed too. Causal attention costs 2 * s^2 * width forward (q k^T and the weighted sum, half
    masked) and twice that backward. The embedding lookup is free, the output layer is not.
    """
    tokens, squares = sum(lengths), sum(n * n for n in lengths)
    frozen = config.num_layers * (
        config.hidden_size * (2 * config.query_width + 2 * config.kv_width)
        + config.mlp_weights(config.moe_router_topk)  # of a mixture, the experts that a token is sent to
    )
    frozen += config.vocab_size * config.hidden_size
    attention = 3 * 2 * config.num_layers * config.query_width * squares
    return float(4 * frozen * tokens + 6 * trainable * tokens + attention)
