"""`preprocess_data.py`: flags of the preprocessing job, and those of other programs that it takes or refuses."""

from __future__ import annotations

from collections.abc import Sequence

from modellink_lora.cli.flags import Accepted, Parser, build_parser, only
from modellink_lora.config.preprocess import PreprocessConfig
from modellink_lora.data.preprocess import run

_NO_CACHE = "nothing is cached, every run reads the data set afresh"
_PADDED_AT_CONVERSION = "the padded size belongs to the checkpoint; give this flag to convert_ckpt.py"

ACCEPTED: dict[str, Accepted] = {
    "overwrite-cache": Accepted(0, _NO_CACHE),
    "cache-dir": Accepted(1, _NO_CACHE),
    "seed": Accepted(1, "nothing is drawn at random here; training shuffles"),
    "json-keys": Accepted("+", "instruction handlers name their columns with --map-keys"),
    "make-vocab-size-divisible-by": Accepted(1, _PADDED_AT_CONVERSION),
    "pad-vocab-size-to": Accepted(1, _PADDED_AT_CONVERSION),
    "dataset-impl": only("mmap", "memory-mapped files are the only kind that is written; remove the flag"),
    "n-subs": only(1, "splitting into parts that are merged again is not offered in this version; use --workers"),
}

_PRETRAINING = "pre-training data are not offered in this version, only instruction data"
_LLAMA_FACTORY = (
    "sets listed in a dataset_info.json are not offered in this version; give the file itself to --input, its columns "
    "to --map-keys"
)
_BPE_FILES = (
    "separate BPE files are not offered in this version; give a Hugging Face folder to --tokenizer-name-or-path"
)

REFUSED: dict[str, str] = {
    "pack": "packing samples is not offered in this version; train with --variable-seq-lengths, which pads little",
    "streaming": "streaming from a hub is not offered in this version; --input reads local files, a block at a time",
    "merge-group-keys": "merging token files is not offered in this version; give all files to --input as a pattern",
    "hf-datasets-params": "options of the datasets library are not offered in this version; --input takes local files",
    "datasets": _LLAMA_FACTORY,
    "dataset-dir": _LLAMA_FACTORY,
    "script-data-dir": _LLAMA_FACTORY,
    "mix-strategy": _LLAMA_FACTORY,
    "interleave-probs": _LLAMA_FACTORY,
    "max-samples": "limiting the samples is not offered in this version; shorten the file given to --input",
    "prompt-type-path": "a file of templates is not offered in this version; choose one by name with --prompt-type",
    "vocab-file": _BPE_FILES,
    "merge-file": _BPE_FILES,
    "split-sentences": _PRETRAINING,
    "keep-newlines": _PRETRAINING,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the job. Returns the exit status."""
    parser = preprocessing_parser()
    given = parser.parse(argv)
    parser.report_accepted(print)
    run(PreprocessConfig(**given[PreprocessConfig]))
    return 0


def preprocessing_parser() -> Parser:
    """The flags of preprocessing."""
    return build_parser(
        "preprocess_data.py",
        "Turn a data set of instructions or conversations into the token files that training reads.",
        [PreprocessConfig],
        refused=REFUSED,
        accepted=ACCEPTED,
    )
