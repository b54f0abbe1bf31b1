"""Data are checked once on each host: hosts may have copies of their own, and processes of one host share theirs."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import numpy
import pytest
import torch

from modellink_lora.config.errors import UserError
from modellink_lora.config.parallel import ParallelConfig
from modellink_lora.data.check import check_corpus
from modellink_lora.data.corpus import InstructionCorpus, data_file, writing_corpus
from modellink_lora.device import limits
from modellink_lora.parallel.context import make_context
from modellink_lora.training import data
from tests.helpers.spawn import run

VOCAB = 300


def checked_here(hosts: list[str], copies: list[str], home: str) -> tuple[str, int]:
    """What rank r of the job says, on the host and with the copy of the data given for r; and how often it read."""
    context, read = make_context(ParallelConfig(), torch.device("cpu")), []

    def counted(*words: object) -> str:
        read.append(words)
        return check_corpus(*words)  # type: ignore[arg-type]

    limits._answers.clear()
    with (
        patch.dict("os.environ", HOME=f"{home}/{hosts[context.rank]}"),
        patch.object(data, "host", lambda: hosts[context.rank]),
        patch.object(data, "check_corpus", counted),
    ):
        try:
            said = data._checked(InstructionCorpus(copies[context.rank]), VOCAB, context)
        except UserError as error:
            said = f"error: {error}"
    limits._answers.clear()
    return said, len(read)


@pytest.fixture
def copies(tmp_path: Path) -> list[str]:
    """The same data twice; a label of the second is another token."""
    for name in "ab":
        with writing_corpus(str(tmp_path / name), {"format": 1}) as writer:
            writer.add([5, 6, 7, 8], [1] * 4, [-100, -100, 7, 8])
    path = data_file(str(tmp_path / "b"), "labels", "bin")
    labels = numpy.fromfile(path, "<i4")
    labels[-1] += 1
    labels.tofile(path)
    return [str(tmp_path / name) for name in "ab"]


@pytest.mark.parametrize(("hosts", "reads"), [(["n1", "n1"], [1, 0]), (["n1", "n2"], [1, 1])])
def test_one_process_of_each_host_reads(hosts: list[str], reads: list[int], copies: list[str], tmp_path: Path) -> None:
    found = run(checked_here, world_size=2, hosts=hosts, copies=[copies[0]] * 2, home=str(tmp_path))
    assert [count for _, count in found] == reads
    assert {said for said, _ in found} == {"checked: ids, labels and checksums of 4 tokens"}


def test_a_copy_damaged_on_another_host_ends_all(copies: list[str], tmp_path: Path) -> None:
    found = run(checked_here, world_size=2, hosts=["n1", "n2"], copies=copies, home=str(tmp_path))
    assert {said.partition(": sample")[0] for said, _ in found} == {f"error: --data-path {copies[1]}"}
