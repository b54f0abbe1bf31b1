"""Adapters that ModelLink saved, any layout and spelling: the same tensors bit for bit, and what is refused."""

from __future__ import annotations

import ast
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modellink_lora.checkpoint.adapter import check_flags, check_resumable
from modellink_lora.checkpoint.adapter_kinds import open_adapter
from modellink_lora.checkpoint.lora_rank_writer import write_lora_rank_files
from modellink_lora.checkpoint.rank_files import open_rank_files
from modellink_lora.checkpoint.unpickle import load_rank_file
from modellink_lora.config.errors import UserError
from modellink_lora.parallel.partition import Partition
from tests.golden import modellink_adapter
from tests.helpers.conversion import TARGETS, convert, hf_tensors
from tests.helpers.foreign import SOURCES, Foreign, damage, make_foreign

QKV = "decoder.layers.0.self_attention.linear_qkv"


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Foreign:
    return make_foreign(tmp_path_factory.mktemp("foreign"))


def dims(foreign: Foreign) -> Any:
    return lambda: open_rank_files(foreign.mg).config


@pytest.mark.parametrize("legacy", [False, True], ids=["mcore", "legacy"])
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_tensors_and_settings_it_was_made_of(
    source: str, legacy: bool, foreign: Foreign, tmp_path: Path
) -> None:
    root = foreign.modellink(tmp_path, legacy=legacy, **SOURCES[source])
    adapter = open_adapter(root, base=dims(foreign))
    assert adapter.shapes == {name: tuple(tensor.shape) for name, tensor in foreign.adapter.items()}
    assert all(torch.equal(adapter.read(name), tensor) for name, tensor in foreign.adapter.items())
    lora = adapter.meta.lora
    assert (lora.r, lora.alpha, lora.target_modules, adapter.meta.iteration) == (4, 16.0, TARGETS, 500)
    expected = open_adapter(foreign.own).meta.base_fingerprint
    assert adapter.meta.base_fingerprint == (None if legacy else expected)


@pytest.mark.parametrize("source", SOURCES)
def test_the_base_beside_an_adapter_is_the_base_it_was_made_of(source: str, foreign: Foreign, tmp_path: Path) -> None:
    files = open_rank_files(foreign.modellink(tmp_path, **SOURCES[source]))
    assert files.holds_adapter and set(files.names()) == set(foreign.base)
    assert all(torch.equal(files.read(name), tensor) for name, tensor in foreign.base.items())


@pytest.mark.parametrize("npu", [False, True], ids=["cpu", "npu"])
@pytest.mark.parametrize("legacy", [False, True], ids=["mcore", "legacy"])
@pytest.mark.parametrize("source", SOURCES)
def test_a_base_of_modellink_is_read_at_every_layout(
    source: str, legacy: bool, npu: bool, foreign: Foreign, tmp_path: Path
) -> None:
    root = foreign.modellink_base(tmp_path, legacy=legacy, npu=npu, **SOURCES[source])
    if npu:
        document = (next(root.glob("iter_*/mp_rank_*/model_optim_rng.pt"))).read_bytes()
        assert b"_rebuild_npu_tensor" in document and b"npu:0" in document
    files = open_rank_files(root)
    assert not files.holds_adapter and files.spelling == ("legacy" if legacy else "mcore")
    assert set(files.names()) == set(foreign.base)
    assert all(torch.equal(files.read(name), tensor) for name, tensor in foreign.base.items())


def test_an_adapter_in_tensors_of_ascend_devices_is_read(foreign: Foreign, tmp_path: Path) -> None:
    adapter = open_adapter(foreign.modellink(tmp_path, tp=2, pp=2, vpp=2, npu=True), base=dims(foreign))
    assert all(torch.equal(adapter.read(name), tensor) for name, tensor in foreign.adapter.items())


@pytest.mark.parametrize("legacy", [False, True], ids=["mcore", "legacy"])
@pytest.mark.parametrize("source", SOURCES)
def test_what_we_write_has_the_keys_and_tensors_that_modellink_writes(
    source: str, legacy: bool, foreign: Foreign, tmp_path: Path
) -> None:
    layout = SOURCES[source]
    theirs = foreign.modellink(tmp_path / "theirs", legacy=legacy, **layout)
    stages, chunks = layout.get("pp", 1), layout.get("vpp", 1)
    counts = layout.get("layers_of_stages") or [4 // (stages * chunks)] * (stages * chunks)
    partition, spelling = Partition(tuple(counts), chunks), "legacy" if legacy else "mcore"
    ours = write_lora_rank_files(
        tmp_path / "ours", open_adapter(foreign.own), tp=layout.get("tp", 1), partition=partition, spelling=spelling
    )
    files = sorted(theirs.glob("iter_*/*/model_optim_rng.pt"))
    assert [f.parent.name for f in files] == [f.parent.name for f in sorted(ours.glob("*/model_optim_rng.pt"))]
    for file in files:
        expected, found = torch.load(file, weights_only=False), load_rank_file(ours / file.parent.name / file.name)
        for key in [key for key in expected if key.startswith("model")]:
            wanted, held = flat(expected[key]), flat(found[key])
            assert held.keys() == {name for name in wanted if ".lora_" in name}
            for name, value in held.items():
                assert value is None if wanted[name] is None else torch.equal(value, wanted[name])
        for name in ("lora_r", "lora_alpha", "lora_target_modules", "num_layers", "tensor_model_parallel_size"):
            assert getattr(found["args"], name) == getattr(expected["args"], name)


def flat(node: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, keys joined by points."""
    result: dict[str, Any] = {}
    for key, value in node.items():
        result |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return result


@pytest.mark.parametrize("change, words", [
    (lambda d: d["modellink_lora"].update(adapter="{"), "is damaged or differs among the files"),
    (lambda d: d["modellink_lora"].update(adapter=d["modellink_lora"]["adapter"].replace('"r": 4', '"r": 9')),
     "says rank 9 for .*linear_fc1, lora_A has the shape"),
    (lambda d: d.pop("modellink_lora"), "is not in every file"),
    (lambda d: d["model"].pop(f"{QKV}.lora_B.default.weight"), "lacks .*linear_qkv.lora_B, the other factor is there"),
])  # fmt: skip
def test_files_of_ours_that_disagree_are_refused(
    change: Callable[[dict[str, Any]], Any], words: str, foreign: Foreign, tmp_path: Path
) -> None:
    write_lora_rank_files(tmp_path, open_adapter(foreign.own), tp=2, partition=Partition((4,)), spelling="mcore")
    damage(tmp_path, change, "mp_rank_00")
    if "rank 9" in words:  # the same in both files
        damage(tmp_path, change, "mp_rank_01")
    with pytest.raises(UserError, match=words) as error:
        open_adapter(tmp_path)
    assert "\n" not in str(error.value)


def test_a_tied_head_of_the_last_stage_is_no_part_of_the_adapter(tmp_path: Path) -> None:
    foreign = make_foreign(tmp_path, layers=2, tied=True)
    for legacy in (False, True):
        root = foreign.modellink(tmp_path / f"legacy {legacy}", tp=2, pp=2, legacy=legacy)
        adapter = open_adapter(root, base=dims(foreign))
        assert all(torch.equal(adapter.read(name), tensor) for name, tensor in foreign.adapter.items())


def test_the_folder_of_an_iteration_can_be_named_itself(foreign: Foreign, tmp_path: Path) -> None:
    root = foreign.modellink(tmp_path, tp=2)
    other = open_adapter(root / "iter_0000500", base=dims(foreign))
    assert other.folder == open_adapter(root, base=dims(foreign)).folder
    own = next(foreign.own.glob("iter_*"))
    assert open_adapter(own).shapes == open_adapter(foreign.own).shapes


def test_flags_that_contradict_the_file_are_refused(foreign: Foreign, tmp_path: Path) -> None:
    adapter = open_adapter(foreign.modellink(tmp_path), base=dims(foreign))
    check_flags(adapter, {"r": 4, "alpha": 16.0, "target_modules": TARGETS})
    for flags in ({"r": 8}, {"alpha": 32.0}, {"target_modules": TARGETS[:1]}):
        with pytest.raises(UserError, match="contradicts the adapter --lora-load"):
            check_flags(adapter, flags)


def test_an_old_file_without_alpha_asks_for_the_flag_and_says_that_it_trusts_it(
    foreign: Foreign, tmp_path: Path
) -> None:
    root = foreign.modellink(tmp_path, tp=2)

    def forget(document: dict[str, Any]) -> None:
        for name in ("lora_r", "lora_alpha", "lora_target_modules"):
            delattr(document["args"], name)

    damage(root, forget)
    with pytest.raises(UserError, match=r"does not say its alpha.*give the one it was trained with by --lora-alpha"):
        open_adapter(root, base=dims(foreign))
    adapter = open_adapter(root, base=dims(foreign), given={"alpha": 16.0})
    assert (adapter.meta.lora.r, adapter.meta.lora.alpha) == (4, 16.0)
    assert any("--lora-alpha 16 is taken on trust" in note for note in adapter.notes)


def test_its_optimizer_is_not_read_so_it_cannot_be_resumed(foreign: Foreign, tmp_path: Path) -> None:
    check_resumable(open_adapter(foreign.own))
    with pytest.raises(UserError, match=r"adapter of ModelLink .* cannot be resumed; give --finetune"):
        check_resumable(open_adapter(foreign.modellink(tmp_path), base=dims(foreign)))


@pytest.mark.parametrize("change, words", [
    (lambda d: setattr(d["args"], "lora_r", 8), "args say lora_r 8, the LoRA factors have rank 4"),
    (lambda d: setattr(d["args"], "lora_target_modules", ["linear_qkv"]), "args say lora_target_modules linear_qkv, "),
    (lambda d: setattr(d["args"], "num_layers", 5), "args say 5 layers, the files hold 4"),
    (lambda d: setattr(d["args"], "tensor_model_parallel_size", 4), "args say tensor_model_parallel_size 4"),
    (lambda d: d["model"].pop(f"{QKV}.lora_B.default.weight"), "lacks .*linear_qkv.lora_B, the other factor is there"),
    (lambda d: d["model"].pop(f"{QKV}.base_layer.weight"), "lacks .*linear_qkv.weight"),
    (lambda d: d["model"].update({f"{QKV}.lora_B.other.weight": torch.zeros(2, 2)}), "only lora_A.default.weight and"),
    (lambda d: d["model"].update({f"{QKV}.weight": torch.zeros(2, 2)}), "twice, with and without base_layer"),
    (lambda d: d["model"].update({f"{QKV}.lora_A.default.weight": torch.zeros(3, 64)}), "factors of ranks 3, 4"),
    (lambda d: d.update({"model1": d.pop("model")}), "mixed up"),
    (lambda d: d.pop("model"), "holds no model"),
])  # fmt: skip
def test_files_that_disagree_are_refused(
    change: Callable[[dict[str, Any]], Any], words: str, foreign: Foreign, tmp_path: Path
) -> None:
    root = foreign.modellink(tmp_path, tp=2)
    damage(root, change)
    with pytest.raises(UserError, match=words) as error:
        open_adapter(root, base=dims(foreign))
    assert "\n" not in str(error.value)


def test_replicas_that_drifted_apart_are_refused_when_read(foreign: Foreign, tmp_path: Path) -> None:
    root = foreign.modellink(tmp_path, tp=2)
    damage(root, lambda d: d["model"][f"{QKV}.lora_A.default.weight"].add_(1e-3), "mp_rank_01")
    with pytest.raises(UserError, match=r"different copies of .*linear_qkv\.lora_A"):
        open_adapter(root, base=dims(foreign))


def test_a_missing_rank_file_is_named(foreign: Foreign, tmp_path: Path) -> None:
    root = foreign.modellink(tmp_path, tp=2, pp=2)
    shutil.rmtree(root / "iter_0000500/mp_rank_01_000")
    with pytest.raises(UserError, match=r"mp_rank_01_000/model_optim_rng\.pt is missing"):
        open_adapter(root, base=dims(foreign))


def test_folders_that_hold_no_adapter_or_two_are_refused(foreign: Foreign, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a model without LoRA factors: give it to --load"):
        open_adapter(foreign.mg, base=dims(foreign))
    with pytest.raises(UserError, match="is a Hugging Face model, not an adapter"):
        open_adapter(foreign.hf)
    with pytest.raises(UserError, match="no such folder"):
        open_adapter(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint"):
        open_adapter(tmp_path / "empty")
    root = foreign.modellink(tmp_path / "two")
    shutil.copy(next(foreign.own.glob("iter_*")) / "adapter.json", root / "iter_0000500")
    with pytest.raises(UserError, match="put the two adapters into two folders"):
        open_adapter(root, base=dims(foreign))
    other = make_foreign(tmp_path / "other", layers=2)
    with pytest.raises(UserError, match="holds 4 layers, the base has 2: the adapter belongs to another model"):
        open_adapter(foreign.modellink(tmp_path / "four"), base=dims(other))


def test_a_legacy_adapter_is_no_base_and_needs_one(foreign: Foreign, tmp_path: Path) -> None:
    root = foreign.modellink(tmp_path, legacy=True, tp=2)
    with pytest.raises(UserError, match="without the layers of its base: give the base to --load and this folder to"):
        open_rank_files(root)
    with pytest.raises(UserError, match="give the base checkpoint too"):
        open_adapter(root)


@pytest.mark.parametrize("load", ["base and adapter", "adapter only"])
def test_merging_gives_what_our_own_adapter_gives(load: str, foreign: Foreign, tmp_path: Path) -> None:
    convert(foreign.mg, tmp_path / "own", to="hf", lora_load=str(foreign.own))
    shutil.copy(foreign.hf / "config.json", (tmp_path / "theirs").mkdir() or tmp_path / "theirs")
    root = foreign.modellink(tmp_path / "lora", tp=2, pp=2)
    both = {"base and adapter": (foreign.mg, {"lora_load": str(root)}), "adapter only": (root, {})}
    base, more = both[load]
    said = convert(base, tmp_path / "theirs", to="hf", **more)
    own, theirs = hf_tensors(tmp_path / "own/mg2hg"), hf_tensors(tmp_path / "theirs/mg2hg")
    assert own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)
    assert ("holds a base and an adapter: the adapter is merged" in said) == (load == "adapter only")


def test_exporting_gives_what_our_own_adapter_gives(foreign: Foreign, tmp_path: Path) -> None:
    convert(foreign.mg, tmp_path / "own", to="peft", lora_load=str(foreign.own))
    root = foreign.modellink(tmp_path / "lora", legacy=True, pp=2)
    convert(foreign.mg, tmp_path / "theirs", to="peft", lora_load=str(root))
    own, theirs = hf_tensors(tmp_path / "own"), hf_tensors(tmp_path / "theirs")
    assert own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)


def test_merging_into_another_base_is_refused(foreign: Foreign, tmp_path: Path) -> None:
    other = make_foreign(tmp_path / "other")
    other.base["decoder.final_layernorm.weight"].add_(1)
    with pytest.raises(UserError, match="was trained on another base"):
        convert(foreign.mg, tmp_path / "x", to="mg", lora_load=str(other.modellink(tmp_path / "lora")))


def test_the_golden_maker_knows_nothing_of_the_program() -> None:
    tree = ast.parse(Path(modellink_adapter.__file__).read_text())
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    modules = {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in imports}
    assert {m.split(".")[0] for m in modules} <= set(sys.stdlib_module_names) | {"torch", "numpy"}


def test_the_golden_maker_runs_from_the_command_line(foreign: Foreign, tmp_path: Path) -> None:
    torch.save(foreign.base, tmp_path / "base.pt")
    torch.save(foreign.adapter, tmp_path / "adapter.pt")
    files = ["--base", tmp_path / "base.pt", "--adapter", tmp_path / "adapter.pt", "--out", tmp_path / "out"]
    sizes = ["--heads", 4, "--groups", 2, "--tp", 2, "--pp", 2, "--vpp", 2, "--legacy"]
    modellink_adapter.main([str(word) for word in [*files, *sizes]])
    adapter = open_adapter(tmp_path / "out", base=dims(foreign))
    assert all(torch.equal(adapter.read(name), tensor) for name, tensor in foreign.adapter.items())
