"""`training.json` and the files beside it: damaged, of another type or of another checkpoint, they are named in a line.

Found by fuzzing: a cut file, a list, a missing or unknown key or a text for a number ended in a traceback, and a bit
flipped in the optimizer's state went on into the run.

Seen in public as huggingface/transformers#35782: a checkpoint that was not written to its end stops the automatic
resume.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modellink_lora.checkpoint.adapter_kinds import open_adapter
from modellink_lora.config.errors import UserError
from tests.helpers.small_adapter import resumed, write_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path)


def edit(path: Path, change: Callable[[dict[str, Any]], Any], *, keep_sums: bool = True) -> None:
    document = json.loads(path.read_text())
    if not keep_sums:
        del document["crc32"]
    change(document)
    path.write_text(json.dumps(document))


def test_what_was_written_is_resumed(folder: Path) -> None:
    progress, schedule, state = resumed(open_adapter(folder))
    assert (progress.iteration, progress.consumed_samples, progress.updates) == (3, 12, 3)
    assert schedule["num_steps"] == 12 and isinstance(schedule["num_steps"], int)
    found = load_file(folder / "optimizer.safetensors")
    assert state.keys() == found.keys() and all(torch.equal(state[name], found[name]) for name in found)


def test_files_written_before_there_were_checksums_are_resumed(folder: Path) -> None:
    expected = resumed(open_adapter(folder))
    for name in ("adapter.json", "training.json"):
        edit(folder / name, lambda document: None, keep_sums=False)
    edit(folder / "training.json", lambda d: [d.pop(key) for key in ("empty_micro_batches", "best", "not_finite")])
    progress, schedule, state = resumed(open_adapter(folder))
    assert (progress, schedule) == expected[:2] and all(torch.equal(state[name], expected[2][name]) for name in state)


@pytest.mark.parametrize("change, words", [
    (lambda d: d.update(zzz=1), "key 'zzz' is not known here"),
    (lambda d: d.update(iteration="x"), "iteration: expected int, got str"),
    (lambda d: d.update(iteration=-3), "iteration -3 is no count"),
    (lambda d: d.update(iteration=4), "is of iteration 4, adapter.json beside it of 3"),
    (lambda d: d.update(updates=1e9), "updates: expected int, got float"),
    (lambda d: d.update(updates=10**30), "updates"),
    (lambda d: d.update(best=[3]), "best: expected object.*got list"),
    (lambda d: d.update(best={}), "best holds nothing, expected iteration and loss"),
    (lambda d: d.update(data=3), "data: expected object, got int"),
    (lambda d: d.pop("scheduler"), "scheduler lacks max_lr"),
    (lambda d: d["scheduler"].pop("num_steps"), "scheduler lacks num_steps"),
    (lambda d: d["scheduler"].update(num_steps="12"), 'scheduler.num_steps is "12", expected a number'),
    (lambda d: d["scheduler"].update(num_steps=-12), "scheduler.num_steps -12 is no count"),
    (lambda d: d["scheduler"].update(max_lr=float("nan")), "scheduler.max_lr is nan, expected a finite number"),
    (lambda d: d["scheduler"].update(lr_decay_style=3), "scheduler.lr_decay_style is 3, expected text"),
    (lambda d: d["scheduler"].update(more=1), "scheduler: key 'more' is not known here"),
    (lambda d: d["data"].update(seed=2), "the samples or their order would change on resume"),
], ids=range(17))  # fmt: skip
def test_a_value_that_cannot_be_is_named(change: Callable[[dict[str, Any]], Any], words: str, folder: Path) -> None:
    edit(folder / "training.json", change, keep_sums=False)
    with pytest.raises(UserError, match=words) as error:
        resumed(open_adapter(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text, words", [
    ('{"iteration": 3', "not valid JSON"), ("[]", "expected object, got list"), ("", "not valid JSON"),
    ("[" * 100_000, r"not valid JSON \(nested too deeply"), ("\xff", "not valid JSON"),
])  # fmt: skip
def test_a_file_that_is_no_record_is_named(text: str, words: str, folder: Path) -> None:
    (folder / "training.json").write_text(text)
    with pytest.raises(UserError, match=rf"training\.json: {words}"):
        resumed(open_adapter(folder))


@pytest.mark.parametrize("name", ["training.json", "adapter.json"])
def test_a_value_that_was_changed_is_noticed(name: str, folder: Path) -> None:
    text = (folder / name).read_text()
    (folder / name).write_text(text.replace('"alpha": 4.0', '"alpha": 5.0').replace('"updates": 3', '"updates": 1'))
    with pytest.raises(UserError, match=rf"{name}: damaged or changed by hand"):
        resumed(open_adapter(folder))
    (folder / name).write_text(json.dumps(dict(reversed(json.loads(text).items()))))  # another spelling of the same
    resumed(open_adapter(folder))


@pytest.mark.parametrize("name", ["optimizer.safetensors", "adapter.safetensors"])
def test_every_flipped_bit_of_tensors_is_noticed(name: str, folder: Path) -> None:
    whole = (folder / name).read_bytes()
    for position in range(0, len(whole), 97):
        data = bytearray(whole)
        data[position] ^= 1 << position % 8
        (folder / name).write_bytes(data)
        with pytest.raises(UserError, match=rf"{name}: damaged"):
            resumed(open_adapter(folder))


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("decoder.layers.1.mlp.linear_fc2.lora_A.exp_avg"), "lacks .*linear_fc2.lora_A.exp_avg"),
    (lambda t: t.update(more=torch.zeros(2)), "holds more, which is of no factor"),
    (lambda t: t.update({n: x[:1].clone() for n, x in t.items()}), r"is \(1, \d+\) of F32, expected"),
    (lambda t: t.update({n: x.half() for n, x in t.items()}), "of F16, expected"),
], ids=["lacks one", "foreign", "shape", "dtype"])  # fmt: skip
def test_an_optimizer_of_another_adapter_is_refused(
    change: Callable[[dict[str, Any]], Any], words: str, folder: Path
) -> None:
    tensors = load_file(folder / "optimizer.safetensors")
    change(tensors)
    save_file(tensors, folder / "optimizer.safetensors")
    edit(folder / "training.json", lambda document: None, keep_sums=False)
    with pytest.raises(UserError, match=words):
        resumed(open_adapter(folder))
