"""Every launch script runs, on a two-layer model of its family and two processes; variables and sizes are given."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.helpers.reference_models import reference_model
from tests.helpers.scripts import EXAMPLES, SCRIPTS, succeeds
from tests.helpers.story import enter_repository, write_data, write_model, write_other_tasks
from tests.helpers.tiny import tiny_tokenizer

FOLDERS = sorted({str(Path(script).parent) for script in SCRIPTS})
CLASSES = {"qwen25": "qwen2", "qwen3": "qwen3", "mixtral": "mixtral", "gemma": "gemma", "bloom": "bloom"}
# a step needs what the steps before it made
ORDER = ("hf2", "data_convert", "tune", "convert", "generate", "chat", "evaluate")
SIZES = {
    "tune": ("--train-iters", 2, "--global-batch-size", 4, "--seq-length", 64),
    "generate": ("--max-new-tokens", 3),
    "evaluate": ("--max-eval-samples", 1, "--num-shots", 0, "--max-new-tokens", 3),
}


def family_model(family: str, folder: Path) -> None:
    if family not in ("minicpm", "index"):
        write_model(folder, CLASSES.get(family, "llama"))
        return
    reference_model(family, folder)
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, "max_position_embeddings": 4096}))
    tiny_tokenizer(folder)


def variables(script: str, place: Path, *, tp: int) -> dict[str, object]:
    """A value for each variable that names a place or a layout, so that all scripts of a folder meet one model."""
    text, name = (EXAMPLES / script).read_text(), Path(script).stem
    tokens, base, alone = place / "tokens/alpaca", place / "base", "convert_ckpt.py" in text
    values: dict[str, object] = {
        "HF_PATH": place / "hf", "TOKENIZER_PATH": place / "hf", "TOKENIZER_MODEL": place / "hf", "CHECKPOINT": base,
        "CKPT_LOAD_DIR": base, "CHECKPOINT_LORA": place / "lora", "OUTPUT_PREFIX": tokens, "DATA_PATH": tokens,
        "CKPT_SAVE_DIR": base if "_hf2" in name else place / "out" / name, "RESULTS": place / "results" / name,
        "TP": 1 if alone else tp, "PP": 1 if alone else 2 // tp, "GPUS_PER_NODE": 2,
    }  # fmt: skip
    if name.startswith("tune"):
        values["CKPT_SAVE_DIR"] = place / "lora" if not (place / "lora").exists() else place / name
    else:
        values["LORA_CHECKPOINT"] = place / "lora"
    if "2hf" in name:  # it takes config.json and tokenizer from there
        values["CKPT_SAVE_DIR"] = place / "hf"
    if "evaluation.py" in text:
        task = (re.findall(r"^TASK=(\w+)$", text, re.M) or ["mmlu"])[0]
        values["DATA_PATH"] = place / task / {"mmlu": "test", "ceval": "val"}.get(task, "")
    return values


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS)
def test_every_script_runs(folder: str, tmp_path: Path) -> None:
    place = enter_repository(tmp_path)
    family_model(Path(folder).name, place / "hf")
    write_data(place)
    write_other_tasks(place)
    mine = [script for script in SCRIPTS if str(Path(script).parent) == folder]

    def turn(script: str) -> int:
        return next(i for i, step in enumerate(ORDER) if step in Path(script).stem)

    merged = place / "hf/mg2hg"
    for number, script in enumerate(sorted(mine, key=turn)):
        name = Path(script).stem
        job = name.partition("_")[0]
        # experts of a mixture are not cut, and its attention is under tensor parallelism: TP alone is tried with it
        tp = 2 if number % 2 or "mixtral" in folder else 1
        printed = succeeds(script, *SIZES.get(job, ()), cwd=place, **variables(script, place, tp=tp))
        if job == "tune":
            assert " lm loss: " in printed, script
        elif job == "generate":
            assert printed.count("ModelLink:") == 4, script
        elif job == "evaluate":
            assert "acc = " in printed, script
        elif "2hf" in name:
            assert list(merged.glob("*.safetensors")), script
            merged.rename(place / "hf" / f"of-{name}")
            (place / "hf/mg2hf").unlink(missing_ok=True)
