"""Llama 1, 2, 3, 3.1, 3.2, Code Llama, Yi, Aquila and the many other models that say model_type llama."""

from __future__ import annotations

import functools

from modellink_lora.models.config_keys import LLAMA_KEYS
from modellink_lora.models.families.common import llama_rows, read_llama_like
from modellink_lora.models.family import Family

LLAMA = Family(
    name="llama2",
    hf_model_types=("llama", "Yi", "aquila"),
    rows=llama_rows(biased=("qkv", "proj", "fc1", "fc2")),
    read=functools.partial(read_llama_like, biases=True),
    keys=LLAMA_KEYS,
    aliases=("codellama", "yi", "llama3"),
)
