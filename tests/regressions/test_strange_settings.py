"""YAML files for `--config` as strangers write them: the value that stands there, or one line.

Seen in public as hiyouga/LlamaFactory#4014 and huggingface/trl#1450: YAML reads a learning rate of 2e-5 as text.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from modellink_lora.cli.train import training_parser
from modellink_lora.config.train import TrainConfig


def bomb() -> str:
    """Nine lists of nine, each in the next: 43 million items in nine lines."""
    lines, before = ["lr: &a [x, x, x, x, x, x, x, x, x]"], "a"
    for name, flag in zip("bcdefgh", ("min-lr", "seed", "load", "save", "stage", "adam-eps", "clip-grad")):
        lines.append(f"{flag}: &{name} [{', '.join([f'*{before}'] * 9)}]")
        before = name
    return "\n".join(lines)


def merges() -> str:
    """Each line holds the mapping of the one before three times: 3^30 entries in 30 lines."""
    lines = [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 3)}]}}" for n in range(1, 31)]
    return "\n".join(["a0: &a0 {x: 1}", *lines])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr: !!python/object/apply:os.system ['touch ran']", "is not YAML: could not determine a constructor"),
        ("lr: " + "[" * 5000, "cannot be read"),
        ("lr: 2020-13-45", "is not YAML"),
        ("train-iters: 010", "010 (line 1) is 8 to YAML"),
        ("train-iters: 1_000", "1_000 (line 1) is 1000 to YAML"),
        ("train-iters: 1:30", "1:30 (line 1) is 90 to YAML"),
        ("train-iters: 0x10", "0x10 (line 1) is 16 to YAML"),
        ("train-iters: yes", "is not a whole number"),
        ("lr: 1e-5\nlr: 1e-4", "lr is given twice (line 2)"),
        ("- lr", "must hold one mapping"),
        ("lr: [1, 2]", "is not a number"),
        (bomb(), "is not a number"),
        (merges(), "is not YAML: merge keys make more than 10000 entries of the mapping in line 10"),
    ],
)
def test_what_yaml_would_make_of_it_is_told(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(SystemExit) as ended:
        training_parser("posttrain_gpt.py").parse(["--config", str(tmp_path / "c.yaml")])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and said in error and error.count("\n") == 1 and len(error) < 600


def test_plain_values_are_read(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("lr: 1e-5\ntrain_iters: 10\nno-shuffle: yes\n")
    given = training_parser("posttrain_gpt.py").parse(["--config", str(tmp_path / "c.yaml")])
    assert given[TrainConfig] == {"lr": 1e-5, "train_iters": 10}
