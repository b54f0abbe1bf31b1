"""Bad input: one line on standard error that names the flag and the way out, a failing status, nothing half written."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from modellink_lora.checkpoint.adapter import AdapterMeta, write_adapter
from modellink_lora.checkpoint.store import iteration_folder, write_tracker
from modellink_lora.cli import convert, plan, preprocess
from modellink_lora.cli.main import run
from modellink_lora.config.adapter import LoraConfig
from tests.helpers.tiny import tiny_model, tiny_tokenizer
from tests.helpers.training import hf_to_megatron, write_corpus

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Files:
    """Good input, of which each case spoils one thing."""

    base: Path  # 2 layers, 4 heads, 2 query groups, ffn 128, 259 tokens, 128 positions
    adapter: Path  # of that base: r 4, alpha 8, linear_proj
    data: str
    root: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("good")
    base = hf_to_megatron(tiny_model("llama", root / "hf"), root / "base")
    adapter(base, root / "adapter", of=base)
    rows = [{"instruction": f"Say {word}.", "input": "", "output": word} for word in ("yes", "no", "maybe")]
    (root / "rows.json").write_text(json.dumps(rows))
    return Files(base, root / "adapter", write_corpus(root / "data"), root)


def adapter(base: Path, folder: Path, *, of: Path) -> Path:
    """Save an adapter for the shapes of `base` that says it was trained on `of`."""
    from modellink_lora.training.base import open_base

    opened, other = (open_base(str(path), {}, tp=1, seed=0, use_mcore_models=None) for path in (base, of))
    lora = LoraConfig(r=4, alpha=8.0, target_modules=("linear_proj",))
    names = [f"decoder.layers.{i}.self_attention.linear_proj" for i in range(opened.config.num_layers)]
    width = opened.config.hidden_size
    tensors = {f"{name}.lora_A": torch.randn(4, width) for name in names}
    tensors |= {f"{name}.lora_B": torch.randn(width, 4) for name in names}
    meta = AdapterMeta(lora=lora, model=opened.config, base_fingerprint=other.fingerprint(), iteration=5)
    write_adapter(iteration_folder(folder, 5), tensors, meta)
    write_tracker(folder, 5)
    return folder


def refused(
    job: Callable[[list[str]], int], words: list[object], capsys: pytest.CaptureFixture[str], *, status: int
) -> str:
    """The one line that `job` prints before it ends with `status`."""
    capsys.readouterr()

    def call() -> int:
        return job([str(word) for word in words])

    try:
        found = run(call)
    except SystemExit as stop:
        found = int(str(stop.code))
    err = capsys.readouterr().err
    assert found == status, err
    assert err.count("\n") == 1 and "Traceback" not in err, err
    return err.strip()


def train(words: list[str], *, pretrain: bool = False) -> int:
    from modellink_lora.cli.train import main

    return main(words, pretrain=pretrain)


def train_words(files: Files, save: Path, changes: dict[str, object]) -> list[object]:
    """A command line that would train; a change to None leaves a flag out, True is a switch."""
    flags: dict[str, object] = {
        "load": files.base, "save": save, "data-path": files.data, "seq-length": 32, "train-iters": 2, "lr": 1e-3,
        "device": "cpu", "eval-iters": 0, "lora-target-modules": ["linear_qkv", "linear_proj"], **changes,
    }  # fmt: skip
    words: list[object] = []
    for name, value in flags.items():
        if value is None:
            continue
        words.append(f"--{name}")
        words += list(value) if isinstance(value, list) else [] if value is True else [value]
    return words


# fmt: off
FLAGS_ALONE: list[tuple[str, dict[str, object], str]] = [
    ("a world that TP x PP does not divide", {"tensor-model-parallel-size": 2},
     "1 processes cannot hold --tensor-model-parallel-size 2 x --pipeline-model-parallel-size 1: start a multiple"),
    ("a global batch that does not divide", {"micro-batch-size": 2, "global-batch-size": 5},
     "--global-batch-size 5 is not a multiple of --micro-batch-size 2 x 1 data-parallel replicas = 2"),
    ("an unknown target", {"lora-target-modules": ["q_proj", "linear_proj"]},
     "--lora-target-modules q_proj matches no layer; this model has linear_qkv linear_proj linear_fc1 linear_fc2 ("),
    ("no target", {"lora-target-modules": None},
     "--lora-target-modules is missing; this program trains adapters only. Name some of: linear_qkv linear_proj"),
    ("rank 0", {"lora-r": 0}, "--lora-r 0: must be at least 1"),
    ("two precisions", {"fp16": True, "bf16": True}, "--bf16 and --fp16 exclude each other: choose one"),
    ("another stage", {"stage": "dpo"},
     "--stage dpo is not offered: this program fine-tunes on instructions (--stage sft)"),
    ("no data path", {"data-path": None}, "--data-path is missing: give the prefix that preprocess_data.py wrote"),
    ("two data paths", {"data-path": ["a", "b"]}, "--data-path takes one prefix, 2 were given"),
    ("stages of a model in one piece", {"num-layer-list": "1,2"},
     "--num-layer-list needs --pipeline-model-parallel-size above 1"),
    ("no learning rate", {"lr": None}, "--lr is missing: give a number that is above 0"),
]
# fmt: on


@pytest.mark.parametrize("case", FLAGS_ALONE, ids=lambda case: case[0])
def test_flags_that_cannot_be_meant(
    case: tuple[str, dict[str, object], str], files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, changes, message = case
    line = refused(train, train_words(files, tmp_path / "save", changes), capsys, status=1)
    assert line.startswith(f"error: {message}")
    assert not (tmp_path / "save").exists()


def places_for(changes: dict[str, object], files: Files, folder: Path) -> dict[str, Path]:
    """What the braces of a case stand for; another base is made only where the case needs one."""
    places = {"root": files.root, "base": files.base, "adapter": files.adapter}
    places |= {name: folder / name for name in ("empty", "other")}
    places["empty"].mkdir()
    if "{other}" in changes.values():
        hf_to_megatron(
            tiny_model("llama", folder / "hf", seed=1, tokenizer="lora-load" not in changes), places["other"]
        )
    return places


# fmt: off
AGAINST_FILES: list[tuple[str, dict[str, object], str]] = [
    ("an empty --load", {"load": "{empty}"}, "--load {empty}: holds no checkpoint (latest_checkpointed_iteration.txt"),
    ("a --load that is not there", {"load": "{root}/gone"}, "--load {root}/gone: no such folder"),
    ("an empty --lora-load", {"lora-load": "{empty}", "lora-target-modules": None},
     "--lora-load {empty}: holds no checkpoint"),
    ("an adapter of another base", {"load": "{other}", "lora-load": "{adapter}", "lora-target-modules": None},
     "--lora-load {adapter}/iter_0000005 was trained on another base than --load {other} (fingerprint "),
    ("layers that contradict the checkpoint", {"num-layers": 3},
     "--num-layers 3 contradicts --load {base}, which says 2: remove the flag"),
    ("an ffn that contradicts the checkpoint", {"ffn-hidden-size": 14436},
     "--ffn-hidden-size 14436 contradicts --load {base}, which says 128: remove the flag"),
    ("an alpha that contradicts the adapter", {"lora-load": "{adapter}", "lora-alpha": 32, "lora-target-modules": None},
     "--lora-alpha 32 contradicts the adapter --lora-load {adapter}/iter_0000005, which was trained with 8: remove"),
    ("targets that contradict the adapter", {"lora-load": "{adapter}"},
     "--lora-target-modules linear_qkv linear_proj contradicts the adapter --lora-load {adapter}/iter_0000005, which"),
    ("an adapter without optimizer state", {"lora-load": "{adapter}", "lora-target-modules": None},
     "--lora-load {adapter}/iter_0000005: training.json is missing, so the run cannot be resumed; give --finetune"),
    ("data that are not there", {"data-path": "{root}/nowhere"},
     "--data-path {root}/nowhere: nowhere_packed_input_ids_document.bin, nowhere_packed_input_ids_document.idx,"),
    ("data of another template", {"prompt-type": "llama2"},
     "--prompt-type llama2 contradicts {root}/data, which was made with alpaca"),
    ("data of another tokenizer", {"load": "{other}"},
     "{root}/data was made with another tokenizer than {other}/hf: preprocess again with this one"),
    ("a sequence beyond the positions", {"seq-length": 129},
     "--seq-length 129 exceeds the model's 128 positions; use a smaller one, or raise --max-position-embeddings"),
    ("a vocabulary that is not the checkpoint's", {"vocab-size": 7},
     "--vocab-size 7 contradicts --load {root}/base, which says 259: remove the flag"),
    ("a split without training samples", {"split": "0,50,50"}, "--split 0,50,50 leaves no training sample of 32 in "),
    ("the best of no validation", {"save-best": True, "eval-iters": 1, "split": "100,0,0"},
     "--save-best needs validations, but --split 100,0,0 holds 0 validation samples of 32, fewer than one"),
    ("the best of too small a validation",
     {"save-best": True, "eval-iters": 1, "split": "90,10,0", "global-batch-size": 4},
     "--save-best needs validations, but --split 90,10,0 holds 3 validation samples of 32, fewer than one"),
]
# fmt: on


@pytest.mark.parametrize("case", AGAINST_FILES, ids=lambda case: case[0])
def test_flags_that_contradict_the_files(
    case: tuple[str, dict[str, object], str], files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, changes, message = case
    places = places_for(changes, files, tmp_path)
    settings = {k: v.format(**places) if isinstance(v, str) else v for k, v in changes.items()}
    line = refused(train, train_words(files, tmp_path / "save", settings), capsys, status=1)
    assert line.startswith(f"error: {message.format(**places)}")
    assert not (tmp_path / "save").exists()


def test_a_truncated_token_file_is_named(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write_corpus(tmp_path / "cut")
    tokens = tmp_path / "cut_packed_labels_document.bin"
    tokens.write_bytes(tokens.read_bytes()[:-8])
    line = refused(train, train_words(files, tmp_path / "save", {"data-path": prefix}), capsys, status=1)
    assert line.startswith(f"error: {tokens}: is truncated: ") and "run preprocess_data.py again" in line
    assert not (tmp_path / "save").exists()


def test_ids_beyond_the_vocabulary_are_named(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from modellink_lora.data.corpus import writing_corpus

    prefix = str(tmp_path / "foreign")
    with writing_corpus(prefix, {"prompt_type": "alpaca"}) as writer:
        writer.add([1, 300, 2], [1, 1, 1], [-100, 300, 2])
    line = refused(train, train_words(files, tmp_path / "save", {"data-path": prefix}), capsys, status=1)
    assert (
        line
        == f"error: --data-path {prefix}: sample 0 has 300 among its input_ids, but the model has 259 tokens: "
        + ("preprocess with this model's own tokenizer, or copy the files again")
    )


def test_a_truncated_rank_file_is_named(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = hf_to_megatron(tiny_model("llama", tmp_path / "hf"), tmp_path / "base")
    (file,) = base.glob("iter_*/mp_rank_00/model_optim_rng.pt")
    file.write_bytes(file.read_bytes()[:5000])
    line = refused(train, train_words(files, tmp_path / "save", {"load": base}), capsys, status=1)
    assert line.startswith(f"error: {file}: ")


def test_an_unknown_flag_is_refused_with_the_closest_one(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*train_words(files, Path("never"), {}), "--lora-alhpa", "8"]
    line = refused(train, words, capsys, status=2)
    assert line == "posttrain_gpt.py: error: unknown flag --lora-alhpa (did you mean --lora-alpha?)"


def test_pretraining_is_refused_with_the_way_to_fine_tune(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(
        lambda words: train(words, pretrain=True), train_words(files, tmp_path / "save", {}), capsys, status=1
    )
    assert line == (
        "error: pretraining is not offered; for instruction data give --is-instruction-dataset or call posttrain_gpt.py"
    )


# fmt: off
BAD_DATA: list[tuple[str, dict[str, str], str]] = [
    ("an unknown handler", {"handler-name": "AlpacaHandler"},
     "--handler-name AlpacaHandler is not offered in this version; choose AlpacaStyleInstructionHandler, "),
    ("an unknown template", {"prompt-type": "lama2"}, "--prompt-type lama2 is not a template of this version; choose "),
    ("a missing column", {"map-keys": '{"response": "answer"}'},
     "the data have no column 'answer', which AlpacaStyleInstructionHandler reads as 'response'; columns found: input, "
     "instruction, output. Name the right one with --map-keys "),
    ("a file that is not there", {"input": "rows.jsonl"},
     "--input rows.jsonl: no such file or folder; data sets are not downloaded, give a local path"),
    ("nothing left", {"seq-length": "8"}, "--input {root}/rows.json: no sample is left of 3 records: 3 x "),
    ("no tokenizer", {"tokenizer-name-or-path": "meta-llama/Llama-2-7b"},
     "--tokenizer-name-or-path meta-llama/Llama-2-7b: no such folder; give a local folder, nothing is downloaded"),
]
# fmt: on


@pytest.mark.parametrize("case", BAD_DATA, ids=lambda case: case[0])
def test_preprocessing_that_cannot_succeed(
    case: tuple[str, dict[str, str], str], files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, changes, message = case
    tiny_tokenizer(tmp_path / "tokenizer")
    flags = {
        "input": str(files.root / "rows.json"), "output-prefix": str(tmp_path / "out/rows"), "prompt-type": "alpaca",
        "tokenizer-name-or-path": str(tmp_path / "tokenizer"), "handler-name": "AlpacaStyleInstructionHandler",
        **changes,
    }  # fmt: skip
    words: list[object] = [word for name, value in flags.items() for word in (f"--{name}", value)]
    line = refused(preprocess.main, words, capsys, status=1)
    assert line.startswith(f"error: {message.format(root=files.root) if '{root}' in message else message}")
    assert not list((tmp_path / "out").glob("*")) and not list((tmp_path / "out").glob(".*"))


# fmt: off
CONVERSIONS: list[tuple[str, dict[str, object], str]] = [
    ("a source that is not there", {"load-dir": "{root}/gone"}, "--load-dir {root}/gone: no such folder"),
    ("an empty source", {"load-dir": "{empty}"}, "--load-dir {empty}: holds no checkpoint"),
    ("no kind of result", {"save-model-type": None}, "--save-model-type is missing: say mg, hf, "),
    ("no place for the result", {"save-dir": None}, "--save-dir is missing: say where the result goes"),
    ("the result over the source", {"save-dir": "{base}"}, "--save-dir {base} is also --load-dir: choose another"),
    ("heads that do not divide", {"target-tensor-parallel-size": 3},
     "--target-tensor-parallel-size 3 does not divide the 4 attention heads of this model"),
    ("groups that do not divide", {"target-tensor-parallel-size": 4},
     "--target-tensor-parallel-size 4 does not divide the 2 query groups of this model"),
    ("stages that do not divide", {"target-pipeline-parallel-size": 3},
     "2 layers do not divide over 3 pipeline stages"),
    ("a list of stages with another sum", {"target-pipeline-parallel-size": 2, "num-layer-list": "1,2"},
     "--num-layer-list 1,2 sums to 3, the model has 2 layers"),
    ("an alpha that contradicts the adapter", {"lora-load": "{adapter}", "lora-alpha": 32},
     "--lora-alpha 32 contradicts the adapter --lora-load {adapter}/iter_0000005, which was trained with 8: remove"),
    ("a rank that contradicts the adapter", {"lora-load": "{adapter}", "lora-r": 16},
     "--lora-r 16 contradicts the adapter --lora-load {adapter}/iter_0000005, which was trained with 4: remove"),
    ("rank 0", {"lora-load": "{adapter}", "lora-r": 0}, "--lora-r 0"),
    ("an unknown target", {"lora-load": "{adapter}", "lora-target-modules": "q_proj"},
     "--lora-target-modules q_proj matches no layer; this model has linear_qkv"),
    ("LoRA flags without an adapter", {"lora-r": 16}, "--lora-r without --lora-load: name the adapter to merge"),
    ("an adapter of another base", {"load-dir": "{other}", "lora-load": "{adapter}"},
     "--lora-load {adapter} was trained on another base than --load-dir {other}: their fingerprints differ"),
    ("another family", {"model-type-hf": "qwen2"}, "--model-type-hf qwen2 contradicts --load-dir {base}, which says"),
    ("an unknown family", {"model-type-hf": "mamba"}, "--model-type-hf mamba is not supported; supported are"),
]
# fmt: on


@pytest.mark.parametrize("case", CONVERSIONS, ids=lambda case: case[0])
def test_conversions_that_cannot_succeed(
    case: tuple[str, dict[str, object], str], files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, changes, message = case
    places = places_for(changes, files, tmp_path)
    flags: dict[str, object] = {
        "load-model-type": "mg", "save-model-type": "mg", "load-dir": "{base}", "save-dir": str(tmp_path / "save"),
        **changes,
    }  # fmt: skip
    words: list[object] = []
    for name, value in flags.items():
        words += [] if value is None else [f"--{name}", str(value).format(**places)]
    before = sorted(files.root.rglob("*"))
    line = refused(convert.main, words, capsys, status=1)
    assert line.startswith(f"error: {message.format(**places)}")
    assert not (tmp_path / "save").exists() and sorted(files.root.rglob("*")) == before


def test_a_truncated_model_is_named_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tiny_model("llama", tmp_path / "hf") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    words = ["--load-model-type", "hf", "--save-model-type", "mg", "--load-dir", file.parent, "--save-dir"]
    line = refused(convert.main, [*words, tmp_path / "save"], capsys, status=1)
    assert line.startswith(f"error: {file}: damaged, cut short or unreadable (") and not (tmp_path / "save").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama-5"}, "--model llama-5 is neither a folder nor one of llama-2-7b, "),
        ({"devices": "8xV100"}, "--devices: V100 is not in the table (H200, H100, A100-80GB, 910B, CPU); take"),
        ({"devices": "8xV100", "calibrate": ""}, "--devices: V100 is not in the table ("),
        ({"model": "llama-5", "devices": "8 x h200 "}, "--model llama-5 is neither a folder nor one of "),
    ],
    ids=["model", "chip", "chip to calibrate", "spaces in the devices"],
)
def test_plans_of_unknown_models_and_devices(
    changes: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"model": "llama-2-7b", "devices": "8xH200", "seq-length": "512", "global-batch-size": "32", **changes}
    flags |= {"calibration": str(tmp_path / "plan-calibration.json")} if "calibrate" in changes else {}
    words: list[object] = [word for name, value in flags.items() for word in (f"--{name}", value) if word]
    assert refused(plan.main, words, capsys, status=1).startswith(f"error: {message}")
    assert not list(tmp_path.iterdir())


def test_layouts_that_the_model_cannot_be_cut_into_name_the_ones_that_work(files: Files) -> None:
    from modellink_lora.config.errors import UserError
    from modellink_lora.config.parallel import ParallelConfig
    from modellink_lora.training.base import open_base

    model = open_base(str(files.base), {}, tp=1, seed=0, use_mcore_models=None).config
    allowed = "of this model; heads, groups and ffn allow 1"
    for tp, changes, what in (
        (3, {}, f"the 4 attention heads {allowed}, 2"),
        (4, {}, f"the 2 query groups {allowed}, 2"),
        (2, {"ffn_hidden_size": 127, "padded_vocab_size": 260}, f"the 127 ffn_hidden_size rows {allowed}"),
        (2, {}, f"the 259 padded vocabulary rows {allowed}, 2; leave --padded-vocab-size out"),
    ):
        with pytest.raises(UserError) as error:
            ParallelConfig(tensor_model_parallel_size=tp).check_model(dataclasses.replace(model, **changes))
        assert str(error.value).startswith(f"--tensor-model-parallel-size {tp} does not divide {what}")


def test_the_vocabulary_is_padded_anew_where_tp_does_not_divide_it(files: Files) -> None:
    from modellink_lora.training.base import open_base

    assert open_base(str(files.base), {}, tp=2, seed=0, use_mcore_models=None).config.padded_vocab_size == 260


def test_two_processes_say_it_once_and_the_launcher_fails(files: Files, tmp_path: Path) -> None:
    """A list of stages with the wrong sum, found by both processes after they have joined."""
    words = train_words(files, tmp_path / "save", {"pipeline-model-parallel-size": 2, "num-layer-list": "2,2"})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "posttrain_gpt.py", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith(("error:", "[rank"))]
    assert ours == ["error: --num-layer-list 2,2 sums to 4, the model has 2 layers"], done.stderr
    assert "modellink_lora/" not in done.stderr, "no traceback through this program"
    assert not (tmp_path / "save").exists()
