"""Every launch script runs, on a two-layer model of its family and two processes; variables and sizes are given."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.reference_models import reference_model
from tests.helpers.scripts import EXAMPLES, ROOT, SCRIPTS, command_of, environment, program_of
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
        first = next(s for s in SCRIPTS if Path(s).parent == Path(script).parent and Path(s).stem.startswith("tune"))
        values["CKPT_SAVE_DIR"] = place / ("lora" if script == first else name)
    else:
        values["LORA_CHECKPOINT"] = place / "lora"
    if "2hf" in name:  # it takes config.json and tokenizer from there
        values["CKPT_SAVE_DIR"] = place / "hf"
    if "evaluation.py" in text:
        task = (re.findall(r"^TASK=(\w+)$", text, re.M) or ["mmlu"])[0]
        values["DATA_PATH"] = place / task / {"mmlu": "test", "ceval": "val"}.get(task, "")
    return values


def turn(script: str) -> int:
    """When it is a script's turn: most need what others have made."""
    return next(i for i, step in enumerate(ORDER) if step in Path(script).stem)


# one folder has all kinds of scripts, and takes a third of a minute; each of the others has a family of its own
@pytest.mark.parametrize(
    "folder", [f if f == "mcore/gemma" else pytest.param(f, marks=pytest.mark.slow) for f in FOLDERS]
)
def test_every_script_runs(folder: str, tmp_path: Path) -> None:
    place = enter_repository(tmp_path)
    family_model(Path(folder).name, place / "hf")
    write_data(place)
    write_other_tasks(place)
    jobs, logs = [], {}
    for number, script in enumerate(sorted((s for s in SCRIPTS if str(Path(s).parent) == folder), key=turn)):
        name = Path(script).stem
        more = ("--overwrite",) if "2hf" in name else SIZES.get(name.partition("_")[0], ())
        tp = 2 if number % 2 or "mixtral" in folder else 1  # else in stages
        command = command_of(script, *more, cwd=place, **variables(script, place, tp=tp))
        program, words = program_of(command)
        logs[name] = place / f"{name}.printed"
        processes = 2 if "--nproc-per-node" in command else 1
        jobs.append({"program": program, "words": words, "processes": processes, "log": str(logs[name])})
    (place / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(ROOT / "tests/helpers/many_jobs.py"), "jobs.json"],
        cwd=place, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    marks = {"tune": " lm loss: ", "generate": "ModelLink:", "evaluate": "acc = "}
    for name, log in logs.items():
        assert marks.get(name.partition("_")[0], "") in log.read_text(), name
    merged = ["base", "hf/mg2hg", f"out/ckpt_convert_{Path(folder).name}_mg2mg_lora"]
    assert [path for path in merged if not (place / path).is_dir()] == ([] if has_merges(folder) else merged[2:])


def has_merges(folder: str) -> bool:
    return "mixtral" not in folder and "legacy" not in folder
