"""Llama 1, 2, 3, 3.1, 3.2 and the many models that say model_type llama (Yi, Code Llama, SmolLM2, ...)."""

from __future__ import annotations

from modellink_lora.models.families.common import LLAMA_ROWS, read_llama_like
from modellink_lora.models.family import Family

LLAMA = Family(name="llama2", hf_model_types=("llama",), rows=LLAMA_ROWS, read_config=read_llama_like)
