"""convert_ckpt.py's flags: the older spelling means what it meant, and what cannot be done is said at once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from modellink_lora.checkpoint.rank_files import open_rank_files
from modellink_lora.cli.convert import main
from modellink_lora.cli.main import run
from modellink_lora.config.convert import ConvertConfig
from modellink_lora.config.errors import UserError
from tests.golden.modellink_base import LLAMA, megatron_tensors
from tests.golden.modellink_base import write as write_base
from tests.helpers.conversion import convert, hf_tensors, random_adapter
from tests.helpers.made_model import Dimensions, made_model
from tests.helpers.tiny import tiny_model

PLACES = {"load_dir": "a", "save_dir": "b"}


@pytest.mark.parametrize("fields, meaning", [
    ({"load_model_type": "hf", "save_model_type": "mg"}, ("hf", "mg")),
    ({"loader": "llama2_hf", "saver": "megatron"}, ("hf", "mg")),
    ({"loader": "megatron", "saver": "megatron", "save_model_type": "save_huggingface_llama"}, ("mg", "hf")),
    ({"loader": "megatron", "saver": "megatron"}, ("mg", "mg")),
    ({"load_model_type": "mg", "save_model_type": "megatron"}, ("mg", "mg")),
    ({"load_model_type": "hf"}, ("hf", "mg")),
])  # fmt: skip
def test_both_generations_of_flags(fields: dict[str, str], meaning: tuple[str, str]) -> None:
    config = ConvertConfig(**PLACES, **fields)
    assert (config.source, config.target) == meaning


@pytest.mark.parametrize("fields, words", [
    ({"load_model_type": "mg"}, "--save-model-type is missing"),
    ({"load_model_type": "mg", "loader": "llama2_hf", "save_model_type": "mg"}, "--loader llama2_hf contradicts"),
    ({"save_model_type": "peft"}, "name it with --lora-load"),
    ({"save_model_type": "hf", "target_tensor_parallel_size": 2}, "--target-tensor-parallel-size is for"),
    ({"save_model_type": "meta", "num_layer_list": "1,1"}, "--num-layer-list is for --save-model-type mg or"),
    ({"save_model_type": "meta", "verify_logits": "1,2"}, "--verify-logits compares a merged model"),
    ({"save_model_type": "gguf-adapter"}, "name it with --lora-load"),
    ({"save_model_type": "mg", "target_tensor_parallel_size": 0}, "must be at least 1"),
    ({"save_model_type": "mg", "load_from_legacy": True, "save_to_legacy": True}, "change nothing"),
])  # fmt: skip
def test_combinations_without_a_meaning(fields: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ConvertConfig(**PLACES, **fields)


def test_the_spelling_of_the_result() -> None:
    def spelling(source: str | None, **fields: bool) -> str:
        return ConvertConfig(**PLACES, save_model_type="mg", **fields).spelling(source)

    assert (
        spelling(None)
        == spelling("legacy")
        == spelling("mcore", use_mcore_models=True, save_to_legacy=True)
        == "legacy"
    )
    assert spelling("mcore") == spelling("legacy", use_mcore_models=True, load_from_legacy=True) == "mcore"


def test_the_older_spelling_keeps_the_sources_layout(tmp_path: Path) -> None:
    hf = tiny_model("llama", tmp_path / "hf")
    common = ["--model-type", "GPT", "--loader"]
    main([*common, "llama2_hf", "--saver", "megatron", "--load-dir", str(hf), "--save-dir", str(tmp_path / "a"),
          "--tokenizer-model", "t.model", "--w-pack", "False", "--target-tensor-parallel-size", "2",
          "--target-pipeline-parallel-size", "2"])  # fmt: skip
    main([*common, "megatron", "--saver", "megatron", "--load-dir", str(tmp_path / "a"), "--save-dir",
          str(tmp_path / "b")])  # fmt: skip
    files = open_rank_files(tmp_path / "b")
    assert (files.tp, files.partition.counts) == (2, (1, 1))


@pytest.mark.parametrize("flag, words", [
    (["--num-experts", "8"], "is read from config.json"),
    (["--moe-grouped-gemm"], "experts are written one by one"),
])  # fmt: skip
def test_what_this_version_cannot_do_is_refused(
    flag: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--load-model-type", "hf", "--load-dir", "a", "--save-dir", "b", *flag])
    assert end.value.code == 2 and words in capsys.readouterr().err


@dataclass(frozen=True)
class Sources:
    """One model of 4 layers and 19 tokens: of Hugging Face, of ModelLink (TP 2, legacy), and an adapter of rank 4."""

    hf: Path
    mg: Path
    mcore: Path
    interleaved: Path
    adapter: Path


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    root = tmp_path_factory.mktemp("sources")
    hf = made_model(root / "hf", Dimensions(layers=4, dtype=torch.bfloat16))
    full = megatron_tensors(hf_tensors(hf), LLAMA, heads=4, groups=2)
    of: dict[str, Any] = {"heads": 4, "groups": 2}
    return Sources(
        hf, write_base(root / "mg", full, tp=2, legacy=True, **of), write_base(root / "mcore", full, pp=2, **of),
        write_base(root / "interleaved", full, pp=2, vpp=2, legacy=True, **of), random_adapter(root / "adapter", hf),
    )  # fmt: skip


COMMANDS = {  # {out} holds the original model's config.json where the result is a Hugging Face model
    "hf2mg": "--load-model-type hf --save-model-type mg --load-dir {hf} --save-dir {out}",
    "mg2mg": "--load-model-type mg --save-model-type mg --load-dir {mg} --save-dir {out}",
    "mcore2mg": "--load-model-type mg --save-model-type mg --load-dir {mcore} --save-dir {out}",
    "mg2hf": "--load-model-type mg --save-model-type hf --load-dir {mg} --save-dir {out}",
    "lora2peft": "--load-model-type hf --save-model-type peft --load-dir {hf} --lora-load {adapter} --save-dir {out}",
    "old hf2mg": "--loader llama2_hf --saver megatron --load-dir {hf} --save-dir {out}",
    "old mg2mg": "--loader megatron --saver megatron --load-dir {mg} --save-dir {out}",
    "old mg2hf": "--loader megatron --saver megatron --save-model-type save_huggingface_llama --load-dir {mg} "
                 "--save-dir {out}",
    "old vpp2hf": "--loader megatron --saver megatron --save-model-type save_huggingface_llama "
                  "--load-dir {interleaved} --save-dir {out}",
    "old vpp2mg": "--loader megatron --saver megatron --load-dir {interleaved} --save-dir {out}",
}  # fmt: skip


def called(
    command: str, flags: str, sources: Sources, out: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of the command as a user types it."""
    if "hf" in command.split("2")[-1]:
        out.mkdir()
        (out / "config.json").write_bytes((sources.hf / "config.json").read_bytes())
    words = f"--model-type GPT {COMMANDS[command]} {flags}".format(**vars(sources), out=out).split()
    capsys.readouterr()
    try:
        status = run(lambda: main(words))
    except SystemExit as end:
        status = int(str(end.code))
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.mark.parametrize("command, flags, name", [
    ("hf2mg", "--tokenizer-model ./tokenizer.model", "--tokenizer-model"),
    ("old hf2mg", "--tokenizer-model ./tokenizer.model", "--tokenizer-model"),
    ("hf2mg", "--vocab-file ./vocab.json", "--vocab-file"),
    ("mg2mg", "--true-vocab-size 19", "--true-vocab-size"),
    ("mg2hf", "--megatron-path ./Megatron-LM", "--megatron-path"),
    ("hf2mg", "--max-queue-size 50", "--max-queue-size"),
    ("mg2hf", "--no-checking", "--no-checking"),
    ("hf2mg", "--spec modellink.tasks.models.spec.gemma2_spec layer_spec", "--spec"),
    ("mg2hf", "--save-to-legacy", "--save-to-legacy"),
    ("mg2hf", "--make-vocab-size-divisible-by 128", "--make-vocab-size-divisible-by"),
    ("lora2peft", "--params-dtype bf16", "--params-dtype"),
    ("lora2peft", "--verify", "--verify"),
    ("lora2peft", "--workers 2", "--workers"),
    ("hf2mg", "--merge-report report.json", "--merge-report"),
    ("hf2mg", "--base-model-name-or-path x", "--base-model-name-or-path"),
])  # fmt: skip
def test_a_flag_without_effect_is_taken_and_said_once(
    command: str, flags: str, name: str, sources: Sources, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said, err = called(command, flags, sources, tmp_path / "out", capsys)
    assert status == 0, err
    assert [line.split(" ")[0] for line in said.splitlines() if " has no effect: " in line] == [name]


@pytest.mark.parametrize("command, flags", [
    ("hf2mg", "--w-pack False --target-expert-parallel-size 1 --model-type-hf llama2"),
    ("mg2mg", "--target-expert-model-parallel-size 1 --load-from-legacy --use-mcore-models"),
    ("mcore2mg", "--use-mcore-models --save-to-legacy"),
    ("old mg2hf", "--w-pack False --params-dtype bf16 --target-tensor-parallel-size 1"),
    ("old vpp2hf", "--num-layers-per-virtual-pipeline-stage 1"),
    ("old vpp2mg", "--num-layers-per-virtual-pipeline-stage 1 --target-pipeline-parallel-size 1"),
])  # fmt: skip
def test_flags_that_say_what_is_so_are_taken(
    command: str, flags: str, sources: Sources, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said, err = called(command, flags, sources, tmp_path / "out", capsys)
    assert status == 0, err
    assert " has no effect: " not in said


# fmt: off
EFFECTS: list[tuple[str, str, dict[str, Any]]] = [  # command, flags, what is found in the result
    ("hf2mg", "", {"tp": 1, "counts": (4,), "spelling": "legacy", "rows": 19, "dtype": torch.bfloat16}),
    ("hf2mg", "--use-mcore-models", {"spelling": "mcore"}),
    ("hf2mg", "--params-dtype fp16", {"dtype": torch.float16}),
    ("hf2mg", "--target-tensor-parallel-size 2", {"tp": 2, "rows": 20}),
    ("hf2mg", "--make-vocab-size-divisible-by 16 --target-tensor-parallel-size 2", {"rows": 32}),
    ("hf2mg", "--target-pipeline-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
     {"counts": (1, 1, 1, 1), "chunks": 2}),
    ("hf2mg", "--target-pipeline-parallel-size 2 --num-layer-list 3,1", {"counts": (3, 1)}),
    ("mg2mg", "", {"tp": 1, "rows": 20, "spelling": "legacy"}),
    ("mg2mg", "--make-vocab-size-divisible-by 32", {"rows": 32}),
    ("mcore2mg", "", {"spelling": "mcore", "counts": (4,)}),
    ("mcore2mg", "--save-to-legacy", {"spelling": "legacy"}),
    ("mg2mg", "--load-from-legacy --use-mcore-models", {"spelling": "mcore"}),
    ("old hf2mg", "", {"tp": 1, "spelling": "legacy"}),
    ("old mg2mg", "", {"tp": 2, "counts": (4,)}),
    ("old vpp2mg", "", {"counts": (1, 1, 1, 1), "chunks": 2}),
    ("old vpp2mg", "--target-pipeline-parallel-size 4", {"counts": (1, 1, 1, 1), "chunks": 1}),
]
# fmt: on


@pytest.mark.parametrize("case", EFFECTS, ids=lambda case: f"{case[0]} {case[1]}")
def test_what_a_flag_does_and_what_holds_without_it(
    case: tuple[str, str, dict[str, Any]], sources: Sources, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, flags, expected = case
    status, _, err = called(command, flags, sources, tmp_path / "out", capsys)
    assert status == 0, err
    files = open_rank_files(tmp_path / "out")
    found = {"tp": files.tp, "counts": files.partition.counts, "chunks": files.partition.chunks, "dtype": files.dtype,
             "spelling": files.spelling, "rows": files.config.padded_vocab_size}  # fmt: skip
    assert {name: found[name] for name in expected} == expected


# fmt: off
REFUSED: list[tuple[str, str, int, str]] = [
    ("hf2mg", "--model-type BERT", 2, "--model-type BERT: only GPT models can be converted"),
    ("hf2mg", "--load-from-legacy", 1, "--load-from-legacy is about a Megatron checkpoint"),
    ("mcore2mg", "--load-from-legacy --use-mcore-models", 1, "--load-from-legacy contradicts --load-dir"),
    ("hf2mg", "--w-pack True", 1, "--w-pack True contradicts --load-dir"),
    ("hf2mg", "--add-qkv-bias", 1, "--add-qkv-bias contradicts --load-dir"),
    ("mg2hf", "--add-dense-bias", 1, "--add-dense-bias contradicts --load-dir"),
    ("mg2mg", "--embed-layernorm", 1, "--embed-layernorm contradicts --load-dir"),
    ("mg2mg", "--post-norm", 1, "--post-norm contradicts --load-dir"),
    ("mg2mg", "--params-dtype int8", 2, "'int8' is not one of fp32, bf16, fp16"),
    ("mg2mg", "--lora-r 16 --lora-alpha 32", 1, "--lora-r --lora-alpha without --lora-load"),
    ("mg2hf", "--target-tensor-parallel-size 2", 1, "--target-tensor-parallel-size is for --save-model-type mg"),
    ("mg2hf", "--num-layers-per-virtual-pipeline-stage 1", 1, "--num-layers-per-virtual-pipeline-stage is for"),
    ("old mg2hf", "--num-layers-per-virtual-pipeline-stage 1", 1,
     "--num-layers-per-virtual-pipeline-stage 1 contradicts --load-dir"),
    ("old vpp2hf", "--num-layers-per-virtual-pipeline-stage 2", 1, "whose stages hold 2x1,2x1 layers"),
    ("hf2mg", "--target-pipeline-parallel-size 2 --num-layer-list 2,2 --num-layers-per-virtual-pipeline-stage 1", 1,
     "exclude each other"),
    ("hf2mg", "--target-tensor-parallel-size 3", 1, "does not divide the 4 attention heads"),
    ("hf2mg", "--model-type-hf bloom", 1, "--model-type-hf bloom contradicts"),
    ("hf2mg", "--target-tensor-parallel 2", 2, "unknown flag --target-tensor-parallel (did you mean"),
    ("hf2mg", "--save-model-typo mg", 2, "unknown flag --save-model-typo"),
]
# fmt: on


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: f"{case[0]} {case[1]}")
def test_a_contradiction_is_one_line_and_writes_nothing(
    case: tuple[str, str, int, str], sources: Sources, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, flags, expected, words = case
    status, _, err = called(command, flags, sources, tmp_path / "out", capsys)
    assert status == expected and words in err and err.count("\n") == 1, err
    assert not [path for path in tmp_path.rglob("*") if path.name not in ("out", "config.json")]


@pytest.mark.parametrize("name, target", [
    ("mg", "mg"), ("megatron", "mg"), ("hf", "hf"), ("save_huggingface_llama", "hf"), ("save_huggingface_qwen", "hf"),
    ("save_huggingface_chatglm3", "hf"), ("huggingface_bloom", "hf"), ("peft", "peft"), ("adapter", "adapter"),
    ("adapter-ranks", "adapter-ranks"),
])  # fmt: skip
def test_every_spelling_of_a_result(name: str, target: str) -> None:
    assert ConvertConfig(**PLACES, load_model_type="mg", save_model_type=name, lora_load="c").target == target


def test_lora_flags_are_read_from_the_adapter_where_they_are_left_out(
    sources: Sources, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said, err = called("mg2hf", f"--lora-load {sources.adapter}", sources, tmp_path / "out", capsys)
    assert status == 0 and f"merged {sources.adapter} into 16 linears" in said, err
    convert(sources.hf, tmp_path / "expected", to="hf", lora_load=str(sources.adapter))
    found, expected = (hf_tensors(tmp_path / name / "mg2hg") for name in ("out", "expected"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_original_model_in_save_dir_stays_and_the_result_has_both_names(
    sources: Sources, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"the original weights")
    (out / "tokenizer.json").write_text("{}")
    (out / "config.json").write_bytes((sources.hf / "config.json").read_bytes())
    words = f"{COMMANDS['mg2hf']} --overwrite".format(**vars(sources), out=out).split()
    for _ in range(2):
        assert main(words) == 0
        assert sorted(path.name for path in out.iterdir()) == [
            "config.json", "mg2hf", "mg2hg", "model.safetensors", "tokenizer.json",
        ]  # fmt: skip
        assert (out / "model.safetensors").read_bytes() == b"the original weights"
        assert (out / "mg2hf/config.json").samefile(out / "mg2hg/config.json")
        assert (out / "mg2hg/tokenizer.json").read_text() == "{}"
    (out / "mg2hf").unlink()
    (out / "mg2hf").mkdir()
    capsys.readouterr()
    assert main(words) == 0 and f"note: {out}/mg2hf is something else and stays" in capsys.readouterr().out
    assert not os.listdir(out / "mg2hf")
