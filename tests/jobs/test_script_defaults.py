"""What the scripts read and write where nothing is set: steps of one model meet, spellings of one model do not."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.scripts import EXAMPLES, SCRIPTS, command_of

FOLDERS = sorted({str(Path(script).parent) for script in SCRIPTS})
_DEFAULT = re.compile(r"^([A-Z_]+)=\$\{\1:-(\./[^}]*)\}", re.MULTILINE)


def defaults(script: str) -> dict[str, str]:
    """Variable -> the path that stands for it where it is not set."""
    return dict(_DEFAULT.findall((EXAMPLES / script).read_text(encoding="utf-8")))


def scripts(folder: str, kind: str) -> Iterator[tuple[str, dict[str, str]]]:
    for script in SCRIPTS:
        if str(Path(script).parent) == folder and re.search(kind, Path(script).name):
            yield script, defaults(script)


def flag(script: str, name: str, tmp_path: Path) -> str:
    command = command_of(script, cwd=tmp_path)
    return command[command.index(name) + 1]


@pytest.mark.parametrize("folder", FOLDERS)
def test_tuning_reads_what_preprocessing_writes(folder: str, tmp_path: Path) -> None:
    ((made, written),) = scripts(folder, "^data_convert_")
    for script, read in scripts(folder, "^tune_"):
        assert read["DATA_PATH"] == written["OUTPUT_PREFIX"], script
        assert flag(script, "--prompt-type", tmp_path) == flag(made, "--prompt-type", tmp_path), script


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_step_finds_the_adapter_and_the_model_of_the_one_before(folder: str) -> None:
    tuned = [found for _, found in scripts(folder, "^tune_")]
    bases = {found["CKPT_LOAD_DIR"] for found in tuned}
    for script, found in scripts(folder, r"^ckpt_convert_.*_hf2(mcore|legacy)\.sh"):
        assert not tuned or found["CKPT_SAVE_DIR"] in bases, script
    adapters = {found["CKPT_SAVE_DIR"] for found in tuned}
    for script, found in scripts(folder, "lora(_mmlu)?(_ptd)?.sh"):
        if Path(script).name.startswith("tune_"):
            continue
        adapter = found.get("LORA_CHECKPOINT") or found.get("CHECKPOINT_LORA")
        assert adapter in adapters, script
        assert (found.get("CHECKPOINT") or found["CKPT_LOAD_DIR"]) in bases, script


def test_scripts_of_two_spellings_write_to_two_places() -> None:
    written: dict[str, dict[str, set[str]]] = {}
    for script in SCRIPTS:
        for name, path in defaults(script).items():
            if name in ("CKPT_SAVE_DIR", "RESULTS", "LOG", "SAVE"):
                written.setdefault(script.partition("/")[0], {}).setdefault(path, set()).add(script)
    for one, other in itertools.combinations(written.values(), 2):
        assert not one.keys() & other.keys()


@pytest.mark.parametrize("script", [s for s in SCRIPTS if re.match("(generate|evaluate|chat)_", Path(s).name)])
def test_the_tokenizers_own_template_can_be_asked_for(script: str, tmp_path: Path) -> None:
    command = command_of(script, "--hf-chat-template", cwd=tmp_path)
    assert "--hf-chat-template" in command and "--prompt-type" not in command
    both = command_of(script, "--hf-chat-template", "--prompt-type", "qwen", cwd=tmp_path)
    own = command_of(script, cwd=tmp_path).count("--prompt-type")
    assert both.count("--prompt-type") == own, "of two templates that the caller gives, the program says its word"
