"""`convert_ckpt.py`: flags in, one conversion out."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modellink_lora.cli.flags import Accepted, Parser, build_parser, only
from modellink_lora.cli.launch import Launch
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.convert import ConvertConfig
from modellink_lora.config.diff import DiffConfig

REFUSED = {
    "moe-grouped-gemm": (
        "experts are written one by one (mlp.experts.local_experts), and grouped ones in --load-dir are read without "
        "being told: leave the flag out"
    ),
    "num-experts": "the number of experts is read from config.json or the checkpoint: leave the flag out",
}
ACCEPTED = {
    "model-type": only("GPT", "only GPT models can be converted"),
    "tokenizer-model": Accepted(1, "tokenizer files are copied with the model's other files"),
    "vocab-file": Accepted(1, "tokenizer files are copied with the model's other files"),
    "true-vocab-size": Accepted(1, "the vocabulary is read from config.json or the checkpoint"),
    "max-queue-size": Accepted(1, "there is no queue: one process reads and writes"),
    "megatron-path": Accepted(1, "no Megatron source tree is needed"),
    "no-checking": Accepted(0, "names and shapes are always checked"),
    "spec": Accepted("+", "the model's family says which tensors there are, and the files must hold exactly those"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Convert, or with `diff A B` compare. Returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["diff"]:
        return diff_main(words[1:])
    parser = conversion_parser()
    given = parser.parse(words)
    convert = ConvertConfig(**given[ConvertConfig])
    parser.report_accepted(print)
    # imported after the flags were checked: mistakes in them need not wait for torch
    from modellink_lora.convert.execute import run

    folder = run(convert, given[LoraConfig], say=print)
    if convert.verify_logits is not None and not convert.dry_run:
        _compare_logits(convert, folder, given[LoraConfig])
    return 0


def diff_main(words: Sequence[str]) -> int:
    """`convert_ckpt.py diff A B`. Returns 0 when they are equal, 1 when they differ."""
    parser = build_parser(
        "convert_ckpt.py diff A B",
        "Compare two checkpoints tensor by tensor, whatever their formats and layouts: models or adapters.",
        [DiffConfig],
    )
    folders = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    given = parser.parse(words[len(folders) :])
    if len(folders) != 2:
        parser.error(f"give two folders to compare, before any flag; {len(folders)} were given")
    config = DiffConfig(**given[DiffConfig])
    from modellink_lora.convert.diff import diff

    return 1 if diff(Path(folders[0]), Path(folders[1]), config, say=print) else 0


def _compare_logits(convert: ConvertConfig, folder: Path, lora_flags: dict[str, Any]) -> None:
    from modellink_lora.cli.processes import joined

    launch = Launch.from_environment()
    with joined(launch, device="auto", timeout_minutes=30) as (device, here):
        from modellink_lora.inference.merged import compare_logits

        compare_logits(convert, folder, lora_flags, device=device, torch_device=here, say=print)


def conversion_parser() -> Parser:
    """The flags of a conversion."""
    return build_parser(
        "convert_ckpt.py",
        "Translate, reshard, merge and export checkpoints: Hugging Face, Megatron (mcore and legacy names), LoRA. "
        "`convert_ckpt.py diff A B` compares two checkpoints of any of these formats.",
        [ConvertConfig, LoraConfig],
        refused=REFUSED,
        accepted=ACCEPTED,
    )
