"""Dimensions of well-known models, for planning without their files: what matters of their published config.json."""

from __future__ import annotations

from typing import Any

from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.families import family_of

_KEYS = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size", "max_position_embeddings",
)  # fmt: skip
_ROWS: dict[str, tuple[Any, ...]] = {
    "llama-2-7b": ("llama", 4096, 32, 32, 32, 11008, 32000, 4096),
    "llama-2-13b": ("llama", 5120, 40, 40, 40, 13824, 32000, 4096),
    "llama-2-70b": ("llama", 8192, 80, 64, 8, 28672, 32000, 4096),
    "llama-3-8b": ("llama", 4096, 32, 32, 8, 14336, 128256, 8192),
    "llama-3-70b": ("llama", 8192, 80, 64, 8, 28672, 128256, 8192),
    "qwen2.5-7b": ("qwen2", 3584, 28, 28, 4, 18944, 152064, 32768),
    "qwen2.5-32b": ("qwen2", 5120, 64, 40, 8, 27648, 152064, 32768),
    "qwen2.5-72b": ("qwen2", 8192, 80, 64, 8, 29568, 152064, 32768),
}
PRESETS = tuple(_ROWS)


def preset(name: str) -> ModelConfig:
    """The model called `name`. Raises UserError listing the names there are."""
    if name not in _ROWS:
        raise UserError(f"--model {name} is neither a folder nor one of {', '.join(PRESETS)}")
    config = dict(zip(_KEYS, _ROWS[name], strict=True))
    return family_of(config["model_type"]).read_config(config)
