"""A small byte-level BPE tokenizer, trained on a few sentences, with the special tokens of the templates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

_SENTENCES = (
    "Human: What is the capital of France? Assistant: The capital of France is Paris.",
    "### Instruction: Name three primary colours. ### Response: Red, yellow and blue.",
    "<<SYS>> You are a helpful assistant. <</SYS>> [INST] Add two and three. [/INST] The sum is five.",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    'system user assistant tool Action: search Action Input: {"city": "Oslo"}',
)
CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def make_tokenizer(folder: Path, extra_tokens: Sequence[str] = (), *, special: Sequence[str] = CHATML) -> Path:
    """Save the tokenizer in `folder` and return it. Ids 0-3 are <unk>, <s>, </s>, <pad>, then `special`.

    Any text can be encoded and decoded back. `extra_tokens` are further special tokens, such as LLAMA3.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>", *special, *extra_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=[*special, *extra_tokens],
    )
    fast.save_pretrained(folder)
    return Path(folder)


def make_spaced_tokenizer(folder: Path, *, everywhere: bool) -> Path:
    """Save a tokenizer that begins texts with a space, as those of sentencepiece do, and return its folder.

    Args:
        everywhere: also behind a special token (Llama 1 and 2), not only at the beginning of a text.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if everywhere:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *CHATML, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=specials, show_progress=False)
    # word by word: no piece of a vocabulary of sentencepiece reaches beyond a space
    tokenizer.train_from_iterator([word for text in _SENTENCES for word in text.split()], trainer)
    made = json.loads(tokenizer.to_str())
    made["added_tokens"] = made["added_tokens"][:-256]  # bytes are words, not tokens to cut out of a text
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(made)),
        unk_token="<unk>", bos_token="<s>", eos_token="</s>", extra_special_tokens=list(CHATML),
    )  # fmt: skip
    fast.save_pretrained(folder)
    return Path(folder)


def make_byte_fallback_tokenizer(folder: Path, *, special: Sequence[str] = CHATML) -> Path:
    """Save in `folder` a tokenizer as Llama 2's, of letters: other characters are bytes such as `<0xE2>`.

    Ids 0-2 are <unk>, <s>, </s>, then `special`, the 256 bytes, the blank `▁` and the letters, alone and after a blank.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.|<>_\n"
    pieces = ["<unk>", "<s>", "</s>", *special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters]
    vocab = {piece: number for number, piece in enumerate([*pieces, *(f"▁{letter}" for letter in letters)])}
    merges = [("▁", letter) for letter in letters]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens=list(special),
    )  # fmt: skip
    fast.save_pretrained(folder)
    return Path(folder)
