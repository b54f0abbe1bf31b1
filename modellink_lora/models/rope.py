"""Inverse frequencies of the rotary embedding, with the scalings of Hugging Face configs. Pure."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modellink_lora.config.model import ModelConfig


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """fp32 [rotated channels / 2] (Su et al., arXiv:2104.09864); `llama3` scaling as published with Llama 3.1."""
    rotated = int(config.kv_channels * config.rotary_percent)
    exponents = torch.arange(0, rotated, 2, dtype=torch.int64).float() / rotated
    frequencies = 1.0 / (config.rotary_base**exponents)
    if config.rope_scaling_type in (None, "dynamic"):  # dynamic: longer than ModelConfig.exact_length only
        return frequencies
    if config.rope_scaling_type == "linear":
        return frequencies / config.rope_scaling_factor
    assert config.rope_scaling_type == "llama3", config.rope_scaling_type
    wavelengths = 2 * math.pi / frequencies
    longest = config.original_max_position_embeddings / config.low_freq_factor
    shortest = config.original_max_position_embeddings / config.high_freq_factor
    scaled = frequencies / config.rope_scaling_factor
    blend = (config.original_max_position_embeddings / wavelengths - config.low_freq_factor) / (
        config.high_freq_factor - config.low_freq_factor
    )
    between = (1 - blend) * scaled + blend * frequencies
    result = torch.where(wavelengths > longest, scaled, frequencies)
    return torch.where((wavelengths <= longest) & (wavelengths >= shortest), between, result)
