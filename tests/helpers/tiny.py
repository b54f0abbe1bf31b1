"""Tiny Hugging Face models and a byte tokenizer for tests: two layers, odd vocabulary, every tensor random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCAB = 259  # 256 bytes + 3 special tokens; odd, so that every padding rule is exercised
SPECIAL = ("<pad>", "<s>", "</s>")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "glm", "glm4", "bloom")
MOE_FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")
# what makes a family's peculiarity visible in a tiny model
PECULIAR: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 32},  # not hidden / heads
    "mistral": {"sliding_window": None},
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 64,
               "attn_logit_softcapping": 1.5, "final_logit_softcapping": 1.0},
    "glm": {"head_dim": 16, "rms_norm_eps": 1e-5},
    "glm4": {"head_dim": 24},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
                  "shared_expert_intermediate_size": 96},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 32},
}  # fmt: skip


def tiny_model(
    family: str,
    folder: Path,
    *,
    layers: int = 2,
    tied: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = False,
    std: float = 0.05,
    **overrides: Any,
) -> Path:
    """Save a random model of transformers' own class (hidden 64, 4 heads, 2 groups, ffn 128) and return `folder`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "tie_word_embeddings": tied, "pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258,
    }  # fmt: skip
    config = AutoConfig.for_model(family, **{**settings, **PECULIAR.get(family, {}), **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # transformers starts biases at 0 and norms at 1: swapped or dropped ones would go unnoticed
            if name.endswith(".bias"):
                parameter.normal_(std=0.1)
            elif parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=std)
    model.to(dtype).save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer(folder)
    return Path(folder)


def tiny_tokenizer(folder: Path) -> Path:
    """Save a tokenizer whose ids 0-255 are the bytes and 256-258 are <pad>, <s>, </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # the printable stand-ins for bytes of byte-level BPE, in byte order
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = iter(range(256, 512))
    letters = [chr(byte if byte in printable else next(shifted)) for byte in range(256)]
    vocab = {letter: byte for byte, letter in enumerate(letters)}
    vocab |= {token: 256 + i for i, token in enumerate(SPECIAL)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos = SPECIAL
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)
    fast.save_pretrained(folder)
    return Path(folder)
