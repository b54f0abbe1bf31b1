"""Labels of a sample train the answers of every turn and nothing else."""

from __future__ import annotations

from modellink_lora.data.encode import NOTHING_TRAINED, drop_reason, encode

EOS = 2
TURNS = [([1, 10, 11], [20, EOS]), ([1, 12], [21, 22, EOS])]


def test_every_answer_is_trained_and_no_question() -> None:
    sample = encode(TURNS, eos_id=EOS, append_eod=False)
    assert sample.input_ids == [1, 10, 11, 20, EOS, 1, 12, 21, 22, EOS]
    assert sample.labels == [-100, -100, -100, 20, EOS, -100, -100, 21, 22, EOS]
    assert sample.attention_mask == [1] * 10


def test_append_eod_adds_one_more_trained_end_of_sequence() -> None:
    plain, ended = (encode(TURNS, eos_id=EOS, append_eod=append) for append in (False, True))
    assert ended.input_ids == [*plain.input_ids, EOS]
    assert ended.labels == [*plain.labels, EOS]
    assert len(ended.attention_mask) == len(ended.labels)


def test_a_sample_of_exactly_seq_length_is_dropped_and_one_shorter_is_kept() -> None:
    sample = encode(TURNS, eos_id=EOS, append_eod=False)
    assert drop_reason(sample, seq_length=10) == "10 tokens or more (--seq-length)"
    assert drop_reason(sample, seq_length=11) is None
    assert drop_reason(sample, seq_length=None) is None


def test_a_sample_without_a_trained_token_is_dropped() -> None:
    assert drop_reason(encode([([5, 6], [])], eos_id=EOS, append_eod=False), seq_length=None) == NOTHING_TRAINED
    # nothing stands before the first token that could predict it
    assert drop_reason(encode([([], [5])], eos_id=EOS, append_eod=False), seq_length=None) == NOTHING_TRAINED
