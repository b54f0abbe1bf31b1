"""Held-out samples without a trained token, or with a loss that is no number, are neither loss 0 nor the best.

Reported of other programs: answers cut off by the sequence length made `eval_loss` nan (meta-llama/llama-cookbook#133,
huggingface/trl#1053). Here the mean of no token was told as 0, perplexity 1, and kept as the best checkpoint.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from modellink_lora.config.errors import UserError
from modellink_lora.config.train import SftDataConfig, TrainConfig
from modellink_lora.data.corpus import InstructionCorpus, writing_corpus
from modellink_lora.training.data import RunData, _lost_to_seq_length
from modellink_lora.training.loop import _is_better
from tests.helpers.spawn import run
from tests.helpers.tiny import tiny_model
from tests.helpers.training import TARGETS, error_of, fine_tune_here, hf_to_megatron, train_flags

SEQ_LENGTH = 16
PP2 = {"pipeline_model_parallel_size": 2}
# what a sample of the data is: (tokens, of which so many at the end are the answer)
WHOLE, CUT, CUT_IN_PART, SILENT, FIRST_ONLY = (10, 4), (24, 4), (18, 8), (10, 0), (1, 1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validation")
    return hf_to_megatron(tiny_model("llama", folder / "hf"), folder / "mg")


def write(prefix: Path, *kinds: tuple[int, int]) -> str:
    with writing_corpus(str(prefix), {"prompt_type": "alpaca"}) as writer:
        for number, (length, answer) in enumerate(kinds):
            ids = [(number + place) % 40 for place in range(length)]
            writer.add(ids, [1] * length, [-100] * (length - answer) + ids[length - answer :])
    return str(prefix)


def notes(prefix: str, split: str, *, batch_size: int = 1, **train: Any) -> list[str]:
    """What the start of a run says of samples that lose something."""
    corpus = InstructionCorpus(prefix)
    ends = [0]
    for count in split.split(","):
        ends.append(ends[-1] + int(count))
    splits = {name: range(ends[i], ends[i + 1]) for i, name in enumerate(("train", "valid", "test"))}
    context: Any = SimpleNamespace(dp_size=1)
    data = SftDataConfig(data_path=(prefix,), seq_length=SEQ_LENGTH)
    flags = TrainConfig(**train_flags(**{"eval_iters": 10, **train}))
    return _lost_to_seq_length(RunData(corpus, splits, data, flags, batch_size, context, []))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (CUT, "2 of 2 validation samples are longer than --seq-length 16 and lose their end"),
        (SILENT, "the answers are missing"),
        (FIRST_ONLY, "the answers are missing"),
    ],
    ids=["cut", "silent", "first token only"],
)
def test_a_validation_set_without_a_trained_token_is_refused(kind: Any, why: str, tmp_path: Path) -> None:
    prefix = write(tmp_path / "d", WHOLE, kind, kind)
    with pytest.raises(UserError, match=f"no validation sample has a trained token, .*: {why}.*--eval-iters 0"):
        notes(prefix, "1,2,0")
    assert notes(prefix, "1,2,0", eval_iters=0) == [], "which is not read"


def test_only_what_a_validation_reads_decides(tmp_path: Path) -> None:
    prefix = write(tmp_path / "d", WHOLE, SILENT, SILENT, WHOLE)
    with pytest.raises(UserError, match="no validation sample"):
        notes(prefix, "1,3,0", batch_size=2)  # the last sample fills no batch
    assert notes(prefix, "1,3,0") == [
        "warning: 2 of 3 validation samples have no trained token; they add nothing to the validation loss"
    ]


def test_cut_samples_are_counted_in_every_split(tmp_path: Path) -> None:
    prefix = write(tmp_path / "d", WHOLE, CUT_IN_PART, CUT, CUT_IN_PART, WHOLE, CUT, SILENT)
    longer = "samples are longer than --seq-length 16 and lose their end"
    assert notes(prefix, "3,2,2") == [
        f"warning: 2 of 3 training {longer}",
        f"warning: 1 of 2 validation {longer}",
        f"warning: 1 of 2 test {longer}",
        f"warning: no test sample has a trained token, so there is no test loss: 1 of 2 test {longer}",
    ]


def test_a_best_that_an_older_version_kept_of_no_token_does_not_count() -> None:
    assert _is_better(3.0, None) and _is_better(3.0, {"iteration": 1, "loss": 4.0})
    assert not _is_better(3.0, {"iteration": 1, "loss": 2.0})
    assert _is_better(3.0, {"iteration": 1, "loss": 0.0}) and _is_better(3.0, {"iteration": 1, "loss": float("nan")})


def arguments(base: Path, prefix: str, parallel: dict[str, Any], split: str, **train: Any) -> dict[str, Any]:
    return dict(
        train=train_flags(load=str(base), **{"train_iters": 2, "global_batch_size": 2, "eval_iters": 9, **train}),
        data={"data_path": (prefix,), "seq_length": SEQ_LENGTH, "split": split, "shuffle": False},
        parallel=parallel,
        lora={"r": 4, "alpha": 8.0, "target_modules": TARGETS},
    )


def said_by(arguments: dict[str, Any], nan_in: tuple[str, ...] = ()) -> tuple[str, str]:
    """(error, output) of this process of a run, in which the model gives nan in the validations of some splits."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), spoiled(nan_in):
        error = error_of(**arguments)
    return error, output.getvalue()


@contextlib.contextmanager
def spoiled(splits: tuple[str, ...]) -> Iterator[None]:
    from modellink_lora.training.loop import Loop

    original = Loop.validate

    def validate(self: Loop, split: str) -> bool:
        model = self.chunks[-1].module
        hook = model.register_forward_hook(
            lambda module, inputs, output: output * (torch.nan if split in splits else 1)
        )
        try:
            return original(self, split)
        finally:
            hook.remove()

    with mock.patch.object(Loop, "validate", validate):
        yield


def rows(save: Path) -> list[dict[str, Any]]:
    def refuse(text: str) -> None:
        raise ValueError(f"{text} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (save / "metrics.jsonl").read_text().splitlines()]


def test_a_run_is_refused_on_every_process_before_it_writes(base: Path, tmp_path: Path) -> None:
    prefix = write(tmp_path / "d", WHOLE, WHOLE, CUT, CUT)
    call = arguments(base, prefix, {}, "2,2,0", save=str(tmp_path / "run"), save_best=True)
    for error, _ in run(said_by, world_size=2, arguments=call):
        assert error.startswith("no validation sample has a trained token")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("parallel", [{}, PP2], ids=["dp2", "pp2"])
def test_a_validation_that_is_nan_is_told_and_is_not_the_best(
    parallel: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    prefix, save = write(tmp_path / "d", *[WHOLE] * 4), tmp_path / "run"
    call = arguments(base, prefix, parallel, "2,2,0", save=str(save), save_best=True, eval_interval=1)
    (error, output), *_ = run(said_by, world_size=2, arguments=call, nan_in=("valid",))
    assert not error
    line = "warning: the validation loss at iteration 2 is nan, outputs are not finite: it counts as none"
    assert line in output and "PPL" not in output
    assert not (save / "best_checkpointed_iteration.txt").exists()
    assert json.loads((save / "iter_0000002/training.json").read_text())["best"] is None
    assert [row["validation loss"] for row in rows(save) if "validation loss" in row] == [None] * 3
    assert f"after iteration 2: {line}" in json.loads((save / "run.json").read_text())["notes"]
    report = (save / "report.md").read_text()
    assert "**validations without a loss**: 3" in report and "best validation" not in report


def test_a_test_without_a_trained_token_is_no_loss_of_0(base: Path, tmp_path: Path) -> None:
    prefix, save = write(tmp_path / "d", *[WHOLE] * 4, CUT, SILENT), tmp_path / "run"
    call = arguments(base, prefix, {}, "2,2,2", save=str(save))
    (error, output), *_ = run(said_by, world_size=2, arguments=call)
    assert not error
    assert "warning: no test sample has a trained token, so there is no test loss: 1 of 2 test samples" in output
    assert "warning: the test loss at iteration 2 is not known, no token is trained: it counts as none" in output
    assert "test loss at iteration 2 |" not in output
    assert [row["test loss"] for row in rows(save) if "test loss" in row] == [None]


def test_a_replica_whose_share_has_no_trained_token_changes_no_validation_loss(base: Path, tmp_path: Path) -> None:
    found = []
    for name, parallel, kinds in (
        ("dp2", {}, (WHOLE, WHOLE, WHOLE, SILENT)),  # the second replica reads the silent one
        ("pp2", PP2, (WHOLE, WHOLE, WHOLE)),
    ):
        save = tmp_path / name
        call = arguments(base, write(tmp_path / f"{name}-d", *kinds), parallel, f"2,{len(kinds) - 2},0",
                         save=str(save), train_iters=1, global_batch_size=2 if name == "dp2" else 1,
                         loss_reduction="token")  # fmt: skip
        run(fine_tune_here, world_size=2, **call)
        found.append(next(row["validation loss"] for row in rows(save) if "validation loss" in row))
    assert found[0] > 1 and found[0] == pytest.approx(found[1], rel=1e-5)


def verified(base: str, prefix: str) -> str:
    from modellink_lora.config.parallel import ParallelConfig
    from modellink_lora.config.verify import VerifyConfig
    from modellink_lora.device import get_device
    from modellink_lora.verification.verify import verify

    with contextlib.redirect_stdout(io.StringIO()):
        try:
            verify(
                VerifyConfig(verify_steps=1, against=("pp2",)), train=TrainConfig(**train_flags(load=base)),
                data_flags={"seq_length": SEQ_LENGTH, "data_path": (prefix,), "shuffle": False},
                parallel=ParallelConfig(),
                model_flags={}, lora_flags={"r": 4, "alpha": 8.0, "target_modules": TARGETS},
                device=get_device("cpu"), torch_device=torch.device("cpu"),
            )  # fmt: skip
        except UserError as error:
            return str(error)
    return ""


def test_verify_needs_a_trained_token_to_compare(base: Path, tmp_path: Path) -> None:
    """It ended in a ZeroDivisionError on the first process, and the others waited for it."""
    said = run(verified, world_size=2, base=str(base), prefix=write(tmp_path / "d", *[CUT] * 8, *[WHOLE] * 8))
    assert len({*said}) == 1 and said[0].startswith("no sample of the first global batch has a trained token")
