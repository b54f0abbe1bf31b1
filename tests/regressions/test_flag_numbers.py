"""Numbers of flags: each has a range, and what lies outside of it is one line before anything is read or started.

NaN is below nothing and above nothing, so that `if value < 0` lets it pass: a learning rate that trains nothing, a norm
that is never clipped.

Seen in public as strands-labs/robots#2028 (zero, negative and infinite norms to clip at were taken) and
pytorch/pytorch#31367 (a negative norm turns all gradients around).
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from typing import Any

import pytest

import modellink_lora.config as configs
from modellink_lora.cli.option import Option, options_of
from modellink_lora.cli.train import training_parser
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.evaluate import EvalConfig
from modellink_lora.config.flag import Range
from modellink_lora.config.train import TrainConfig

# what the other fields of a class must be for its checks of one field to be reached
NEEDED: dict[str, dict[str, Any]] = {
    "ConvertConfig": {"save_dir": "s", "load_dir": "l", "save_model_type": "mg"},
    "EvalConfig": {"task": ("mmlu",), "task_data_path": ("x",)},
    "LogitsConfig": {"load": "l", "prompt_file": "p.txt", "output": "o.safetensors"},
    "CompareConfig": {"prompt": ("p",)},
    "PlanConfig": {"model": "m", "devices": "8xH200", "seq_length": 8, "global_batch_size": 8},
    "PreprocessConfig": {"input": "i", "output_prefix": "o", "tokenizer_name_or_path": "t"},
    "SftDataConfig": {"data_path": ("d",), "seq_length": 8},
    "TrainConfig": {"lr": 1e-3, "train_iters": 10},
    "ModelConfig": dict(num_layers=2, hidden_size=64, num_attention_heads=4, max_position_embeddings=64, vocab_size=9,
                        position_embedding_type="rope"),
}  # fmt: skip


def classes() -> list[type]:
    modules = [importlib.import_module(f"{configs.__name__}.{m.name}") for m in pkgutil.iter_modules(configs.__path__)]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    return list(dict.fromkeys(c for c in found if dataclasses.is_dataclass(c) and c is not Range))


NUMBERS = [option for config in classes() for option in options_of(config) if option.kind in (int, float)]


def make(option: Option, value: Any) -> Any:
    return option.config(**{**NEEDED.get(option.config.__name__, {}), option.field: value})


def bad_values(option: Option) -> list[Any]:
    allowed: Range = next(f for f in dataclasses.fields(option.config) if f.name == option.field).metadata["range"]
    values: list[Any] = [math.nan, math.inf, -math.inf, True, "1", [1]]
    values += (
        [2**31, 10**400, 1.5]
        if option.kind is int and option.field != "seed"
        else [10**400 * int(allowed.at_most or 0)]
    )
    for limit, step in ((allowed.at_least, -1), (allowed.at_most, 1)):
        values += [] if limit is None else [option.kind(limit + step)]
    values += [option.kind(limit) for limit in (allowed.above, allowed.below) if limit is not None]
    return [value for value in values if value is True or value != 0 or (allowed.above or allowed.at_least or -1) >= 0]


@pytest.mark.parametrize("option", NUMBERS, ids=lambda option: option.dest)
def test_every_number_has_a_range_that_holds(option: Option) -> None:
    for value in bad_values(option):
        with pytest.raises(UserError) as caught:
            make(option, value)
        assert option.field.split("_")[-1] in str(caught.value).replace("-", "_") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"clip_grad": math.nan}, r"--clip-grad nan: must be at least 0"),
        ({"adam_eps": 0.0}, r"--adam-eps 0\.0: must be above 0"),
        ({"initial_loss_scale": math.inf}, r"--initial-loss-scale inf: must be above 0"),
        ({"lr_warmup_init": 1.0}, r"--lr-warmup-init 1\.0 must be at most --lr 0\.001"),
        ({"seed": -1}, r"--seed -1: must be at least 0 and at most 4294967295"),
        ({"lr": 0.0}, r"--lr is missing: give a number that is above 0"),
        ({"distributed_timeout_minutes": 10**12}, r"must be at least 1 and at most 525600"),
    ],
)
def test_numbers_that_trained_in_silence_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        TrainConfig(**{**NEEDED["TrainConfig"], **fields})


def test_patterns_of_ranks_and_alphas_are_numbers_too() -> None:
    for fields in ({"rank_pattern": {"q": True}}, {"rank_pattern": {"q": 0}}, {"alpha_pattern": {"q": math.nan}}):
        with pytest.raises(UserError, match=r"_pattern\[q\]"):
            LoraConfig(**fields)


@pytest.mark.parametrize("temperature", [math.nan, math.inf, -0.1])
def test_evaluations_sample_at_a_real_temperature(temperature: float) -> None:
    with pytest.raises(UserError, match="--temperature"):
        EvalConfig(task=("mmlu",), task_data_path=("x",), temperature=temperature)


@pytest.mark.parametrize("text", ["1_000", "٣", " 5", "5 ", "1e3", "0x10", "1.0", "", "--", "five"])
def test_whole_numbers_are_written_as_such(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        training_parser("posttrain_gpt.py").parse([f"--train-iters={text}"])
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1
