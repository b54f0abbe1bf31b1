"""Random flags with hostile values: one line, or configs whose numbers lie in their ranges; never another exception.

Seen in public as strands-labs/robots#1943: learning rates with which nothing can be learned were taken.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from modellink_lora.cli.flags import build_parser
from modellink_lora.cli.option import Option, options_of
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.convert import ConvertConfig
from modellink_lora.config.engine import EngineConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.evaluate import EvalConfig
from modellink_lora.config.flag import check_ranges
from modellink_lora.config.infer import InferConfig
from modellink_lora.config.model import ModelConfig
from modellink_lora.config.parallel import ParallelConfig
from modellink_lora.config.plan import PlanConfig
from modellink_lora.config.preprocess import PreprocessConfig
from modellink_lora.config.train import SftDataConfig, TrainConfig

PROGRAMS: dict[str, tuple[type, ...]] = {
    "train": (ModelConfig, ParallelConfig, LoraConfig, SftDataConfig, TrainConfig),
    "convert": (ConvertConfig,),
    "infer": (EngineConfig, ParallelConfig, InferConfig),
    "evaluate": (EngineConfig, ParallelConfig, EvalConfig),
    "preprocess": (PreprocessConfig,),
    "plan": (PlanConfig,),
}
BASE: dict[type, dict[str, Any]] = {  # what each class needs, under the random flags
    ModelConfig: dict(num_layers=2, hidden_size=8, num_attention_heads=2, max_position_embeddings=8, vocab_size=9,
                      position_embedding_type="rope"),
    SftDataConfig: dict(data_path=("x",), seq_length=8), TrainConfig: dict(train_iters=10, lr=1e-4),
    ConvertConfig: dict(load_dir="x", save_dir="y", load_model_type="hf"), PlanConfig: dict(
        model="x", devices="2xCPU", seq_length=8, global_batch_size=8),
    EvalConfig: dict(task=("mmlu",), task_data_path=("x",)),
}  # fmt: skip
HOSTILE = [
    "nan", "inf", "-inf", "-1", "0", "1", "2", "0.5", "1e3", "1e400", "0x10", "1_000", " 5", "٣", "²", "+5", "1.0", "",
    str(2**31), str(2**64), "9" * 5000, "x" * 300, "a\nb", "\udcff", "true", "{}", "[1]", '{"a": NaN}', "6,8", "a=b",
]  # fmt: skip


def _words(random_: random.Random, options: list[Option]) -> list[str]:
    words = []
    for option in random_.choices(options, k=random_.randint(1, 6)):
        words.append(f"--{random_.choice(option.spellings)}")
        if option.kind is not bool or option.many:
            value = random_.choice([*HOSTILE, *(option.choices or ())])
            words[-1:] = [f"{words[-1]}={value}"]
    return words


@pytest.mark.parametrize("inputs", [500, pytest.param(5000, marks=pytest.mark.slow)])
def test_flags(inputs: int, capsys: pytest.CaptureFixture[str]) -> None:
    random_ = random.Random(7)
    parsers = {name: build_parser(name, "", configs) for name, configs in PROGRAMS.items()}
    made = 0
    for _ in range(inputs):
        name = random_.choice(list(PROGRAMS))
        configs = PROGRAMS[name]
        words = _words(random_, [option for config in configs for option in options_of(config) if option.spellings])
        try:
            settings = parsers[name].parse(words)
        except SystemExit as ended:
            assert ended.code, words
            continue
        except UserError as error:
            assert str(error), words
            continue
        for config in configs:
            try:
                one = config(**{**BASE.get(config, {}), **settings[config]})
            except UserError as error:
                assert str(error), words
                continue
            check_ranges(one)
            made += 1
    assert made > inputs / 20
    capsys.readouterr()
