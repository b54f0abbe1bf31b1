"""From turns to one training sample: ids, labels that train the answers only, and the reasons to drop a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modellink_lora.data.text_encoder import Ids

IGNORED = -100  # label of a position that is not trained

NOTHING_TRAINED = "no token of an answer is left to train"


@dataclass(frozen=True)
class Sample:
    """One sequence. The mask is 1 for every token; labels stand at their own token, not yet shifted."""

    input_ids: Ids
    attention_mask: Ids
    labels: Ids
    special_text: frozenset[str] = frozenset()  # special tokens that its texts spelled


def encode(turns: Sequence[tuple[Ids, Ids]], *, eos_id: int | None, append_eod: bool) -> Sample:
    """Join the turns; each source is ignored by the loss and each target, in every turn, is trained.

    Args:
        append_eod: one more `eos_id` at the very end, trained like the answer before it (most templates already end
            with one).
    """
    input_ids: Ids = []
    labels: Ids = []
    for source, target in turns:
        input_ids += source + target
        labels += [IGNORED] * len(source) + target
    if append_eod:
        assert eos_id is not None, "the tokenizer always has an end-of-sequence token"
        input_ids.append(eos_id)
        labels.append(eos_id if turns[-1][1] else IGNORED)
    return Sample(input_ids, [1] * len(input_ids), labels)


def drop_reason(sample: Sample, *, seq_length: int | None) -> str | None:
    """Why `sample` cannot be used, or None."""
    if seq_length is not None and len(sample.input_ids) >= seq_length:
        return too_long(seq_length)
    # the first label has no position before it that could predict it
    if all(label == IGNORED for label in sample.labels[1:]):
        return NOTHING_TRAINED
    return None


def too_long(seq_length: int) -> str:
    """The reason given for samples dropped for their length."""
    return f"{seq_length} tokens or more (--seq-length)"
