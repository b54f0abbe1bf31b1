"""`convert_ckpt.py`: flags in, one conversion out."""

from __future__ import annotations

from collections.abc import Sequence

from modellink_lora.cli.flags import Accepted, build_parser, only
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.convert import ConvertConfig

_EXPERTS = "mixture-of-experts models are not available in this version; leave the flag out"
_VIRTUAL = "virtual pipeline stages are not available in this version; spread layers with --num-layer-list"
REFUSED = {
    "num-layers-per-virtual-pipeline-stage": _VIRTUAL,
    "moe-grouped-gemm": _EXPERTS,
    "num-experts": _EXPERTS,
    "spec": "layers are built from the model family; --model-type-hf and config.json choose it",
}
ACCEPTED = {
    "model-type": only("GPT", "only GPT models can be converted"),
    "target-expert-parallel-size": only(1, _EXPERTS),
    "target-expert-model-parallel-size": only(1, _EXPERTS),
    "w-pack": only("False", "packed W_pack weights (Baichuan) are not available in this version"),
    "tokenizer-model": Accepted(1, "tokenizer files are copied with the model's other files"),
    "vocab-file": Accepted(1, "tokenizer files are copied with the model's other files"),
    "true-vocab-size": Accepted(1, "the vocabulary is read from config.json or the checkpoint"),
    "max-queue-size": Accepted(1, "there is no queue: one process reads and writes"),
    "megatron-path": Accepted(1, "no Megatron source tree is needed"),
    "no-checking": Accepted(0, "names and shapes are always checked"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Convert. Returns the exit status."""
    parser = build_parser(
        "convert_ckpt.py",
        "Translate, reshard, merge and export checkpoints: Hugging Face, Megatron (mcore and legacy names), LoRA.",
        [ConvertConfig, LoraConfig],
        refused=REFUSED,
        accepted=ACCEPTED,
    )
    given = parser.parse(argv)
    convert = ConvertConfig(**given[ConvertConfig])
    parser.report_accepted(print)
    # imported after the flags were checked: mistakes in them need not wait for torch
    from modellink_lora.convert.execute import run

    run(convert, given[LoraConfig], say=print)
    return 0
