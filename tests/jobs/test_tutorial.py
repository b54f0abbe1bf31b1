"""ModelLink's LoRA tutorial, command after command, in both spellings of the model, on a small Llama.

The commands are the tutorial's own, with its relative paths. Overridden are places where two commands would write the
same folder and the number of devices; in the short form of the tests also the number of iterations.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

from tests.helpers.conversion import hf_tensors
from tests.helpers.scripts import environment, succeeds
from tests.helpers.story import enter_repository, write_data, write_model

HF = "model_from_hf/llama-2-7b-hf"
PREPROCESS = """
python ./preprocess_data.py \
    --input ./dataset/train-00000-of-00001-a09b74b3ef9c3b56.parquet \
    --tokenizer-name-or-path ./model_from_hf/llama-2-7b-hf \
    --output-prefix ./finetune_dataset/llama-2-7b/alpaca \
    --workers 16 \
    --log-interval 1000 \
    --tokenizer-type PretrainedFromHF \
    --handler-name AlpacaStyleInstructionHandler \
    --prompt-type llama2
"""
MERGE = """
source /usr/local/Ascend/ascend-toolkit/set_env.sh

python convert_ckpt.py \
    --model-type GPT \
    --load-model-type mg \
    --save-model-type {kind} \
    --load-dir ./model_weights/llama-2-7b-legacy/ \
    --lora-load ./ckpt/llama-2-7b-lora \
    --lora-r 16 \
    --lora-alpha 32 \
    --lora-target-modules query_key_value dense dense_h_to_4h dense_4h_to_h \
    --target-tensor-parallel-size 1 \
    --target-pipeline-parallel-size 1 \
    --save-dir {save}
"""
SIX = {
    f"alpaca_packed_{key}_document.{end}" for key in ("input_ids", "attention_mask", "labels") for end in ("bin", "idx")
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    enter_repository(tmp_path)
    write_model(tmp_path / HF)
    write_data(tmp_path)
    return tmp_path


def typed(command: str, place: Path) -> str:
    """A command of the tutorial in the user's shell, which goes on after a line that fails."""
    done = subprocess.run(["bash", "-c", command], cwd=place, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tuned(names: str, place: Path, *words: object) -> None:
    """Preprocess and tune; the adapter is the tutorial's."""
    succeeds(f"{names}/llama2/data_convert_llama2_instruction.sh", cwd=place)
    made = "sharegpt" if names == "legacy" else "alpaca"
    assert list(place.glob(f"finetune_dataset/llama-2-7b/{made}_packed_labels*.bin"))
    typed(PREPROCESS, place)
    assert {path.name for path in place.glob("finetune_dataset/llama-2-7b/*packed*document.*")} >= SIX
    text = succeeds(f"{names}/llama2/tune_llama2_7b_lora_ptd.sh", *words, cwd=place, timeout=7200, GPUS_PER_NODE=2,
                    CKPT_SAVE_DIR="./ckpt/llama-2-7b-lora",
                    DATA_PATH="./finetune_dataset/llama-2-7b/alpaca")  # fmt: skip
    log = f"logs/tune_llama2_7b_{'legacy_' if names == 'legacy' else ''}lora_ptd.log"
    assert " lm loss: " in text and (place / log).read_text() == text
    *_, settings = sorted(place.glob("ckpt/llama-2-7b-lora/iter_*/adapter.json"))
    lora = json.loads(settings.read_text())["lora"]
    assert (lora["r"], lora["alpha"]) == (16, 32.0)


def differs(a: Path, b: Path) -> bool:
    x, y = hf_tensors(a), hf_tensors(b)
    assert x.keys() == y.keys()
    return any(not torch.equal(x[name], y[name]) for name in x)


def judged(names: str, script: str, place: Path) -> None:
    succeeds(
        f"{names}/llama2/generate_llama2_7b_lora_ptd.sh", "--task", "greedy", "--max-new-tokens", 4, cwd=place,
        CHECKPOINT=f"./model_weights/llama-2-7b-{names}", CHECKPOINT_LORA="./ckpt/llama-2-7b-lora/",
        TOKENIZER_PATH=f"./{HF}",
    )  # fmt: skip
    text = succeeds(f"{names}/llama2/{script}", cwd=place, GPUS_PER_NODE=2, LORA_CHECKPOINT="./ckpt/llama-2-7b-lora")
    assert len(re.findall(r"acc = ", text)) >= 1, text


def legacy(place: Path, *words: object) -> None:
    succeeds("legacy/llama2/ckpt_convert_llama2_hf2legacy.sh", cwd=place)
    tuned("legacy", place, *words)
    typed(MERGE.format(kind="mg", save="./model_weights/llama-2-7b-lora2legacy"), place)
    typed(MERGE.format(kind="hf", save="./model_from_hf/llama-2-7b-hf/"), place)
    by_hand = place / HF / "mg2hg"
    assert differs(by_hand, place / HF)
    for script, save in (("legacy2legacy_lora", "model_weights/again"), ("legacy2hf_lora", "again")):
        (place / "again").mkdir(exist_ok=True)
        succeeds(f"legacy/llama2/ckpt_convert_llama2_{script}.sh", cwd=place, CKPT_SAVE_DIR=save,
                 LORA_CHECKPOINT="./ckpt/llama-2-7b-lora")  # fmt: skip
    assert not differs(by_hand, place / "again/mg2hg")
    succeeds(
        "legacy/llama2/ckpt_convert_llama2_legacy2hf.sh", cwd=place, CKPT_LOAD_DIR="model_weights/again",
        CKPT_SAVE_DIR="merged",
    )  # fmt: skip
    assert not differs(by_hand, place / "merged/mg2hg")
    loads_with_transformers(by_hand)
    judged("legacy", "evaluate_llama2_7B_lora_mmlu_ptd.sh", place)


def mcore(place: Path, *words: object) -> None:
    succeeds("mcore/llama2/ckpt_convert_llama2_hf2mcore.sh", cwd=place, TP=2)
    tuned("mcore", place, *words)
    succeeds("mcore/llama2/ckpt_convert_llama2_mg2mg_lora.sh", cwd=place)
    succeeds("mcore/llama2/ckpt_convert_llama2_mcore2hf_lora.sh", cwd=place)
    assert differs(place / HF / "mg2hg", place / HF)
    loads_with_transformers(place / HF / "mg2hg")
    judged("mcore", "evaluate_llama2_7b_lora_ptd.sh", place)


def loads_with_transformers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(folder).vocab_size <= model.config.vocab_size


FEW = ("--train-iters", 2, "--global-batch-size", 4)


def test_the_tutorial_in_legacy_names(place: Path) -> None:
    legacy(place, *FEW)


def test_the_tutorial_in_mcore_names(place: Path) -> None:
    mcore(place, *FEW)


@pytest.mark.slow
@pytest.mark.parametrize("story", [legacy, mcore])
def test_the_tutorial_with_nothing_but_places_and_devices_overridden(story: object, place: Path) -> None:
    story(place)  # type: ignore[operator]
