"""Token files: what is written is read back, by us and by Megatron, and damage never goes unnoticed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest

from modellink_lora.config.errors import UserError
from modellink_lora.data.corpus import KEYS, InstructionCorpus, data_file, sidecar_file, writing_corpus

SAMPLES = [([5, 6, 7], [-100, 6, 7]), ([8], [-100]), ([70000, 9], [-100, 9])]


def write(prefix: Path, samples: list[tuple[list[int], list[int]]] = SAMPLES) -> str:
    with writing_corpus(str(prefix), {"prompt_type": "llama2"}) as writer:
        for input_ids, labels in samples:
            writer.add(input_ids, [1] * len(input_ids), labels)
    return str(prefix)


def test_a_corpus_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    corpus = InstructionCorpus(write(tmp_path / "new" / "folder" / "set"))
    assert len(corpus) == 3
    for i, (input_ids, labels) in enumerate(SAMPLES):
        for found, expected in zip(corpus[i], (input_ids, labels)):
            assert found.dtype == numpy.int64
            assert found.tolist() == expected
    assert corpus.sidecar is not None and corpus.sidecar["max_token_id"] == 70000
    assert corpus.lengths.tolist() == [3, 1, 2]
    assert corpus.warnings() == []


def test_only_the_six_files_and_the_record_are_left(tmp_path: Path) -> None:
    write(tmp_path / "set")
    expected = {data_file("set", key, ending).name for key in KEYS for ending in ("bin", "idx")}
    assert {file.name for file in tmp_path.iterdir()} == expected | {"set_packed.json"}
    assert "set_packed_attention_mask_document.idx" in expected


def test_a_bare_prefix_means_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(InstructionCorpus(write(Path("set")))) == 3
    assert (tmp_path / "set_packed_labels_document.bin").is_file()


def test_megatron_reads_our_files_as_we_do(tmp_path: Path) -> None:
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    corpus = InstructionCorpus(write(tmp_path / "set"))
    for position, key in ((0, "input_ids"), (1, "labels")):
        theirs = indexed_dataset.IndexedDataset(str(tmp_path / f"set_packed_{key}_document"))
        assert theirs.sequence_lengths.tolist() == [3, 1, 2]
        assert theirs.document_indices.tolist() == [0, 1, 2, 3]
        assert [theirs[i].tolist() for i in range(3)] == [corpus[i][position].tolist() for i in range(3)]
    mask = indexed_dataset.IndexedDataset(str(tmp_path / "set_packed_attention_mask_document"))
    assert [mask[i].tolist() for i in range(3)] == [[1, 1, 1], [1], [1, 1]]


def test_we_read_megatrons_files_with_empty_documents(tmp_path: Path) -> None:
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    for key in KEYS:
        stem = str(tmp_path / f"old_packed_{key}_document")
        builder = indexed_dataset.IndexedDatasetBuilder(f"{stem}.bin", dtype=numpy.int32)
        for values in ([3, 4], [], [5]):
            if values:
                builder.add_item(torch.tensor(values))
            builder.end_document()
        builder.finalize(f"{stem}.idx")
    corpus = InstructionCorpus(str(tmp_path / "old"))
    assert [corpus[i][0].tolist() for i in range(len(corpus))] == [[3, 4], [5]]
    assert corpus.sidecar is None


def test_the_record_says_what_was_written(tmp_path: Path) -> None:
    record = InstructionCorpus(write(tmp_path / "set")).sidecar
    assert record is not None
    assert record.pop("crc32").keys() == {f"{k}.{e}" for k in KEYS for e in ("bin", "idx")} | {"this document"}
    assert record == {
        "prompt_type": "llama2", "samples": 3, "tokens": 6, "trained_tokens": 3, "max_token_id": 70000,
    }  # fmt: skip


def test_a_record_of_other_files_is_ignored_with_a_warning(tmp_path: Path) -> None:
    prefix = write(tmp_path / "set")
    file = sidecar_file(prefix)
    record = json.loads(file.read_text()) | {"tokens": 7}
    del record["crc32"]
    file.write_text(json.dumps(record))
    corpus = InstructionCorpus(prefix)
    assert corpus.sidecar is None
    assert ["describes other data" in warning for warning in corpus.warnings()] == [True]


def test_labels_that_repeat_the_ids_are_warned_about(tmp_path: Path) -> None:
    corpus = InstructionCorpus(write(tmp_path / "set", [([5, 6], [5, 6]), ([7, 8], [7, 8])]))
    assert ["every label equals its token" in warning for warning in corpus.warnings()] == [True]


def test_a_failed_run_leaves_the_earlier_files_and_no_temporary_ones(tmp_path: Path) -> None:
    prefix = write(tmp_path / "set")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(RuntimeError), writing_corpus(prefix, {}) as writer:
        writer.add([1], [1], [1])
        raise RuntimeError
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("key", KEYS)
def test_a_truncated_bin_is_named_with_found_and_expected_bytes(tmp_path: Path, key: str) -> None:
    prefix = write(tmp_path / "set")
    file = data_file(prefix, key, "bin")
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(UserError, match=rf"{file.name}: is truncated: 21 bytes found, 24 expected"):
        InstructionCorpus(prefix)


def test_a_bin_that_is_too_long_belongs_to_another_index(tmp_path: Path) -> None:
    prefix = write(tmp_path / "set")
    file = data_file(prefix, "labels", "bin")
    file.write_bytes(file.read_bytes() + b"1234")
    with pytest.raises(UserError, match="28 bytes found, 24 expected"):
        InstructionCorpus(prefix)


@pytest.mark.parametrize("keep", [0, 20, 60])
def test_a_truncated_index_is_damaged_or_no_index(tmp_path: Path, keep: int) -> None:
    prefix = write(tmp_path / "set")
    file = data_file(prefix, "labels", "idx")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"{file.name}: is (damaged|not an index)"):
        InstructionCorpus(prefix)


def test_keys_of_different_runs_do_not_fit_together(tmp_path: Path) -> None:
    prefix = write(tmp_path / "set")
    for samples, message in (
        (SAMPLES[:2], "3 sequences of input_ids but 2 of labels"),
        ([SAMPLES[0], SAMPLES[2], SAMPLES[1]], "sequence 1 has 1 input_ids but 2 labels"),
    ):
        other = write(tmp_path / "other", samples)
        for ending in ("bin", "idx"):
            data_file(other, "labels", ending).replace(data_file(prefix, "labels", ending))
        with pytest.raises(UserError, match=message):
            InstructionCorpus(prefix)


def test_missing_files_are_listed(tmp_path: Path) -> None:
    prefix = write(tmp_path / "set")
    data_file(prefix, "labels", "idx").unlink()
    with pytest.raises(UserError, match=r"set_packed_labels_document\.idx missing"):
        InstructionCorpus(prefix)
