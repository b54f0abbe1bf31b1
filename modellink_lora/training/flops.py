"""Arithmetic of a LoRA step and memory of a rank, from dimensions alone. Pure."""

from __future__ import annotations

from modellink_lora.config.model import ModelConfig

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def lora_step_flops(config: ModelConfig, trainable: int, lengths: list[int]) -> float:
    """Floating point operations of forward and backward over samples of these true lengths, padding not counted.

    A frozen matrix costs 2 per weight and token forward and 2 backward (input gradient only); an adapter 6, because
    its weight gradient is needed too. Causal attention costs 2 * s^2 * width forward (q k^T and the weighted sum, half
    masked) and twice that backward. The embedding lookup is free, the output layer is not.
    """
    tokens, squares = sum(lengths), sum(n * n for n in lengths)
    frozen = config.num_layers * (
        config.hidden_size * (2 * config.query_width + 2 * config.kv_width)
        + 3 * config.hidden_size * config.ffn_hidden_size
    )
    frozen += config.vocab_size * config.hidden_size
    attention = 3 * 2 * config.num_layers * config.query_width * squares
    return float(4 * frozen * tokens + 6 * trainable * tokens + attention)


def rank_memory(
    parameters: int, trainable: int, *, dtype: str, adapter_dtype: str, config: ModelConfig,
    tokens: int, layers: int, tp: int, sequence_parallel: bool, recompute: bool,
) -> dict[str, int]:  # fmt: skip
    """Estimated bytes on one rank: frozen weights, adapters (weights, fp32 gradient, master, two moments), activations.

    Args:
        parameters, trainable: frozen and trained elements on this rank.
        tokens: of one micro-batch. layers: of this stage.
    """
    master = 0 if adapter_dtype == "fp32" else 4
    width = BYTES[dtype]
    spread = tp if sequence_parallel else 1
    # per token and layer: two norm inputs and outputs (cut under SP), q k v, attention output, fc1 output, its product
    cut = (2 * config.query_width + 2 * config.kv_width + 3 * config.ffn_hidden_size) // tp
    layer = (4 * config.hidden_size // spread + cut) * width
    if recompute:
        layer = config.hidden_size // spread * width
    logits = config.padded_vocab_size // tp * (4 + width)
    return {
        "weights": parameters * width,
        "adapters": trainable * (BYTES[adapter_dtype] + 4 + master + 8),
        "activations (rough)": tokens * (layer * layers + logits),
    }
