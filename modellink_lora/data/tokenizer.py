"""Loading a Hugging Face tokenizer from a local folder and fitting its end-of-sequence token to a template."""

from __future__ import annotations

import hashlib
import importlib.metadata
import unicodedata
from pathlib import Path
from typing import Any

from modellink_lora.config.document import read_document
from modellink_lora.config.errors import UserError
from modellink_lora.data.templates import get_template

_FALLBACK_EOS = "<|endoftext|>"
# words that every vocabulary spells, blanks of two kinds, digits, and characters of two and three bytes
_PROBES = ("we need to add 9 and 6", "the first line\nthe second line", "a caf\u00e9 and \u4e2d too")
_NEWLINES = ("\n", "\u010a", "<0x0A>")  # as vocabularies write it: as it is, byte-level, sentencepiece
# sequence lengths are checked where samples are made; the tokenizer's own limit only warns
_NO_LIMIT = 10**9


def load_tokenizer(
    path: str | Path, *, prompt_type: str | None = None, use_fast: bool = True, trust_remote_code: bool = False
) -> Any:
    """The tokenizer in folder `path` with an eos and a pad token, and the eos token the template asks for.

    Nothing is downloaded and no token is added: ids beyond the model's embedding cannot arise.

    Args:
        trust_remote_code: run the Python files that the folder names in auto_map; never asked about on the terminal.
    Raises:
        UserError: there is no such folder, it is damaged or needs code that may not run, or the vocabulary lacks a
            token of the template.
    """
    template = None if prompt_type is None else get_template(prompt_type)
    tokenizer = _read(path, use_fast, trust_remote_code)
    size = len(tokenizer)
    if template is not None and template.replace_eos:
        _set(tokenizer, "eos_token", template.stop_words[0], path, f"--prompt-type {template.name} ends answers with")
    if tokenizer.eos_token_id is None:
        _set(tokenizer, "eos_token", _FALLBACK_EOS, path, "it has no eos token, and lacks the usual substitute")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    for word in () if template is None else template.stop_words:
        _require(tokenizer, word, path, f"--prompt-type {prompt_type} uses")
        if word not in tokenizer.all_special_tokens:
            # in the vocabulary already, but not yet cut out of the text as one piece
            tokenizer.add_special_tokens({"extra_special_tokens": [word]}, replace_extra_special_tokens=False)
    assert len(tokenizer) == size, "no token may be added"
    return tokenizer


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of the vocabulary: equal when every id means the same token.

    The eos and pad tokens are not part of it: a template changes them, and one vocabulary serves several templates.
    """
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{index}\t{token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _read(path: str | Path, use_fast: bool, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer  # seconds to import, and not every caller gets here

    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"--tokenizer-name-or-path {path}: no such folder; give a local folder, nothing is downloaded")
    if not any(folder.glob("tokenizer*")) and not (folder / "vocab.json").is_file():
        raise UserError(f"--tokenizer-name-or-path {path}: holds no tokenizer (tokenizer.json or tokenizer.model)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, use_fast=use_fast, local_files_only=True, model_max_length=_NO_LIMIT,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    except Exception as error:  # whatever a broken file makes the library raise
        if not trust_remote_code and "trust_remote_code" in str(error):
            files = ", ".join(sorted(file.name for file in folder.glob("*.py"))) or "which the folder lacks"
            raise UserError(
                f"--tokenizer-name-or-path {path}: this tokenizer is Python code of its publisher ({files}): read it, "
                "then give --trust-remote-code to run it"
            ) from None
        reason = _unknown_class(folder) or " ".join(str(error).split())
        raise UserError(f"--tokenizer-name-or-path {path}: cannot be loaded: {reason}") from error
    check_round_trip(tokenizer, path)
    if _is_llama_sentencepiece(folder, tokenizer):
        _compare_with_sentencepiece(folder, tokenizer, path)
    return tokenizer


def check_round_trip(tokenizer: Any, path: str | Path) -> None:
    """Raise UserError for a tokenizer whose ids do not decode to the text, because its file was read as another kind.

    What tokenizers lose by intent is no fault: case, accents, the kind and number of blanks, blanks beside a character
    that is a word by itself, and characters that the vocabulary lacks.
    """
    for text in _PROBES:
        ids = tokenizer.encode(text, add_special_tokens=False)
        found = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if _essence(found) != _essence(text) and not _is_beyond(tokenizer, text, ids):
            version = importlib.metadata.version("transformers")
            raise UserError(
                f"--tokenizer-name-or-path {path}: transformers {version} reads it as "
                f"{type(tokenizer).__name__}, which gives {found!r} back for {text!r}: the tokenizer_class in "
                "tokenizer_config.json may not be that of its files (byte-level ones are PreTrainedTokenizerFast), or "
                "a newer transformers reads it rightly"
            )


def _is_beyond(tokenizer: Any, text: str, ids: list[int]) -> bool:
    """Whether the vocabulary lacks a character of `text`, or, where the ids have unknown tokens, a whole word."""
    vocabulary = tokenizer.get_vocab()
    held = "".join(vocabulary)
    if not all(c in held for c in text if not c.isspace()):
        return True
    if "\n" in text and not any(newline in held for newline in _NEWLINES):
        return True
    words = text.split() if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids else []
    alone = [tokenizer.decode(tokenizer.encode(word, add_special_tokens=False)) for word in words]
    return any(word not in found for word, found in zip(words, alone))


def _essence(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text.casefold())
    words = "".join(c for c in plain if not unicodedata.combining(c)).split()
    return " ".join(words)


def _settings(folder: Path, name: str) -> dict[str, Any]:
    return read_document(folder / name, dict[str, Any]) if (folder / name).is_file() else {}


def _is_llama_sentencepiece(folder: Path, tokenizer: Any) -> bool:
    """Whether the ids are to be those that sentencepiece itself gives for the folder's tokenizer.model."""
    if (folder / "tokenizer.json").is_file() or not (folder / "tokenizer.model").is_file():
        return False
    settings = _settings(folder, "tokenizer_config.json")
    if settings.get("add_prefix_space") is False or not type(tokenizer).__module__.startswith("transformers."):
        return False
    named = settings.get("tokenizer_class")
    if named is None:
        return _settings(folder, "config.json").get("model_type") in ("llama", "mistral", "mixtral")
    return named in ("LlamaTokenizer", "LlamaTokenizerFast")


def _compare_with_sentencepiece(folder: Path, tokenizer: Any, path: str | Path) -> None:
    """transformers chooses the class by config.json's model_type too, and some of them drop the leading space."""
    from sentencepiece import SentencePieceProcessor

    text = "Human: what is it?"
    if tokenizer.encode(text, add_special_tokens=False) != SentencePieceProcessor(
        model_file=str(folder / "tokenizer.model")
    ).encode(text):
        raise UserError(
            f"--tokenizer-name-or-path {path}: transformers reads tokenizer.model as {type(tokenizer).__name__}, which "
            "gives other ids than the file itself; put the publisher's tokenizer.json beside it"
        )


def _unknown_class(folder: Path) -> str | None:
    """That the folder names a class which transformers does not have; None where that is not the reason."""
    import transformers

    settings = _settings(folder, "tokenizer_config.json")
    name, code = settings.get("tokenizer_class"), settings.get("auto_map")
    if not isinstance(name, str) or hasattr(transformers, name):
        return None
    named = code.get("AutoTokenizer") if isinstance(code, dict) else None
    if any(named) if isinstance(named, list) else named:
        return None  # its code ran, and the error is its own
    return f"tokenizer_class {name} is unknown to transformers, and the folder brings no code for it"


def _set(tokenizer: Any, attribute: str, token: str, path: str | Path, why: str) -> None:
    _require(tokenizer, token, path, why)
    tokenizer.add_special_tokens({attribute: token}, replace_extra_special_tokens=False)


def _require(tokenizer: Any, token: str, path: str | Path, why: str) -> None:
    if token not in tokenizer.get_vocab():
        raise UserError(
            f"the tokenizer in {path} has no token {token}: {why} {token}, and a new token would have no row in the "
            "model's embedding; choose the --prompt-type this model was made for"
        )
