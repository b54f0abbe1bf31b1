"""Token files with changed, missing or added bytes: refused, or what training reads is what was written.

Seen in public as allenai/OLMo-core#619: damaged token ids ended in a device-side assert of the embedding.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from modellink_lora.config.errors import UserError
from modellink_lora.data.check import check_corpus
from modellink_lora.data.corpus import KEYS, InstructionCorpus, data_file, sidecar_file, writing_corpus

VOCAB = 300


def mutated(good: bytes, rng: random.Random) -> bytes:
    data = bytearray(good)
    kind = rng.choice(["bit", "byte", "cut", "insert", "zeros", "swap", "twice"])
    place = rng.randrange(len(data))
    if kind == "bit":
        data[place] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        data[place] = rng.randrange(256)
    elif kind == "cut":
        del data[place : place + rng.choice([1, 4, 8, len(data)])]
    elif kind == "insert":
        data[place:place] = rng.randbytes(rng.choice([1, 4, 8]))
    elif kind == "zeros":
        data[place : place + 8] = bytes(min(8, len(data) - place))
    elif kind == "swap":
        other = rng.randrange(len(data))
        data[place], data[other] = data[other], data[place]
    else:
        data += data[place:]
    return bytes(data)


def content(prefix: str) -> list[tuple[list[int], list[int]]]:
    corpus = InstructionCorpus(prefix)
    check_corpus(corpus, VOCAB)
    return [(ids.tolist(), labels.tolist()) for ids, labels in (corpus[i] for i in range(len(corpus)))]


def run_inputs(inputs: int, folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr("modellink_lora.data.check._note_of", lambda *_: None)  # each is read anew
    rng, prefix = random.Random(seed), str(folder / "a")
    with writing_corpus(prefix, {"format": 1, "prompt_type": "empty"}) as writer:
        for length in (9, 1, 30, 2, 17):
            ids = [rng.randrange(VOCAB) for _ in range(length)]
            writer.add(ids, [1] * length, [-100] * (length // 2) + ids[length // 2 :])
    files = [sidecar_file(prefix), *(data_file(prefix, key, ending) for key in KEYS for ending in ("bin", "idx"))]
    good, expected = {file: file.read_bytes() for file in files}, content(prefix)
    refused = 0
    for _ in range(inputs):
        changed = rng.sample(files, rng.choice([1, 1, 1, 2]))
        for file in changed:
            file.write_bytes(mutated(good[file], rng))
        try:
            assert content(prefix) == expected, changed
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        for file in changed:
            file.write_bytes(good[file])
    assert inputs > refused > inputs / 2


def test_300_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_inputs(300, tmp_path, monkeypatch, seed=1)


@pytest.mark.slow
def test_3000_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_inputs(3000, tmp_path, monkeypatch, seed=2)
