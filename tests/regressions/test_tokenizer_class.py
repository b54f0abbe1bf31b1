"""A tokenizer that transformers reads as another kind than its file is refused; what tokenizers lose by intent is not.

Seen in public as huggingface/transformers #45488, #46489 and #48206: byte-level files whose tokenizer_config.json names
LlamaTokenizerFast lose every blank.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from modellink_lora.config.errors import UserError
from modellink_lora.config.preprocess import PreprocessConfig
from modellink_lora.data.preprocess import run
from modellink_lora.data.tokenizer import load_tokenizer
from tests.helpers.shared import shared
from tests.helpers.tiny_tokenizer import make_tokenizer

TEXT = ["we need to add 9 and 6", "the first line the second line", "a café and 中 too"] * 3
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


def rebuilt(folder: Path, **changes: Any) -> Path:
    """A byte-level tokenizer whose parts are those of another kind, as some releases of transformers made them."""
    file = make_tokenizer(folder) / "tokenizer.json"
    document = json.loads(file.read_text())
    document["model"].update(changes.pop("model", {}))
    file.write_text(json.dumps({**document, **changes}))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": METASPACE, "decoder": METASPACE},
        {"pre_tokenizer": METASPACE, "decoder": METASPACE, "model": {"unk_token": "<unk>"}},
        {"decoder": METASPACE},
        {"pre_tokenizer": METASPACE},
    ],
)
def test_a_byte_level_file_read_as_sentencepiece_is_refused_before_anything_is_written(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    folder = rebuilt(tmp_path / "tokenizer", **changes)
    (tmp_path / "d.json").write_text('[{"instruction": "q", "input": "", "output": "a"}]')
    config = PreprocessConfig(
        input=str(tmp_path / "d.json"), output_prefix=str(tmp_path / "out/p"), tokenizer_name_or_path=str(folder),
        handler_name="AlpacaStyleInstructionHandler", prompt_type="default",
    )  # fmt: skip
    with pytest.raises(
        UserError, match=r"reads it as \w+, which gives '.*' back for 'we need to add 9 and 6'"
    ) as error:
        run(config, say=lambda line: None)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


BYTES = pre_tokenizers.ByteLevel.alphabet()
KINDS: dict[str, tuple[Any, Any, Any, Any, Any]] = {
    "byte-level with a blank before": (
        models.BPE(), None, pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel(),
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=BYTES, show_progress=False),
    ),
    "lower case, accents stripped": (
        models.WordPiece(unk_token="<unk>"), normalizers.BertNormalizer(lowercase=True),
        pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(),
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False),
    ),
    "NFKC and single blanks": (
        models.Unigram(), normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\n", " ")]),
        pre_tokenizers.Metaspace(), decoders.Metaspace(),
        trainers.UnigramTrainer(vocab_size=60, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False),
    ),
    "sentencepiece without bytes, which knows no line end": (
        models.BPE(unk_token="<unk>"), None, pre_tokenizers.Metaspace(), decoders.Metaspace(),
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False),
    ),
    "few whole words": (
        models.WordLevel(unk_token="<unk>"), None, pre_tokenizers.Whitespace(), None,
        trainers.WordLevelTrainer(vocab_size=12, special_tokens=["<unk>"], show_progress=False),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_tokenizer_loses_by_intent_is_no_fault(kind: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    model, normalizer, pre_tokenizer, decoder, trainer = KINDS[kind]
    tokenizer = Tokenizer(model)
    for name, part in (("normalizer", normalizer), ("pre_tokenizer", pre_tokenizer), ("decoder", decoder)):
        if part is not None:
            setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).eos_token == "</s>"


@pytest.mark.parametrize("name", ["mistral-v1-32k", "smollm2-bpe-49k"])
def test_published_tokenizers_pass(name: str) -> None:
    load_tokenizer(shared(f"models/tokenizers/{name}"))
