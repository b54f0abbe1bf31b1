"""Training settings: batch arithmetic and combinations that exclude each other."""

from __future__ import annotations

from typing import Any

import pytest

from modellink_lora.config.errors import UserError
from modellink_lora.config.train import SftDataConfig, TrainConfig


def test_the_global_batch_is_a_whole_number_of_micro_batches_of_all_replicas() -> None:
    config = TrainConfig(train_iters=1, lr=1e-3, micro_batch_size=4, global_batch_size=32)
    assert config.batch_size(2) == 32
    with pytest.raises(UserError, match="32 is not a multiple of --micro-batch-size 4 x 3 data-parallel replicas = 12"):
        config.batch_size(3)
    assert TrainConfig(train_iters=1, lr=1e-3, micro_batch_size=4).batch_size(3) == 12, "the default is one block"


def test_the_dtype_is_fp32_unless_a_flag_says_otherwise() -> None:
    flags: list[dict[str, Any]] = [{}, {"bf16": True}, {"fp16": True}]
    assert [TrainConfig(train_iters=1, lr=1.0, **flag).dtype for flag in flags] == ["fp32", "bf16", "fp16"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stage": "rm"}, "--stage rm is not offered"),
        ({"bf16": True, "fp16": True}, "--bf16 and --fp16 exclude each other"),
        ({"train_iters": 0}, "--train-iters is missing: give a number that is at least 1"),
        ({"micro_batch_size": 0}, "--micro-batch-size 0: must be at least 1"),
        ({"lr": 0.0}, "--lr is missing: give a number that is above 0"),
        ({"lr": -1.0}, "--lr -1.0: must be above 0"),
        ({"min_lr": 2.0}, "--min-lr 2.0 must be at most --lr 0.001"),
        ({"lr_warmup_fraction": 0.1, "lr_warmup_iters": 2}, "--lr-warmup-fraction and --lr-warmup-iters exclude each"),
        ({"lr_warmup_fraction": 1.0}, "--lr-warmup-fraction 1.0: must be at least 0 and below 1"),
        ({"lr_warmup_iters": 10}, "--lr-warmup-iters 10 must be below the decay's number of steps"),
        ({"recompute_granularity": "full"}, "full needs --recompute-method and --recompute-num-layers"),
        ({"recompute_method": "uniform"}, "--recompute-method needs --recompute-granularity full"),
        ({"clip_grad": -1.0}, "must be at least 0"),
        ({"overlap_param_gather": True}, "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad"),
        ({"save_best": True}, "need --save: name a folder"),
        ({"save_best": True, "save": "run", "eval_iters": 0}, "--save-best needs validations, --eval-iters 0 asks for"),
        ({"save_total_limit": -1}, "--save-total-limit -1: must be at least 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(**{"train_iters": 10, "lr": 1e-3, **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data_path": ()}, "--data-path is missing"),
        ({"data_path": ("a", "b")}, "--data-path takes one prefix, 2 were given"),
        ({"seq_length": 0}, "--seq-length is missing"),
        ({"pad_to_multiple_of": 0}, "--pad-to-multiple-of 0: must be at least 1"),
    ],
)
def test_data_settings_that_cannot_be_meant_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SftDataConfig(**{"data_path": ("a",), "seq_length": 32, **values})


def test_linears_overlap_with_collectives_in_the_fused_path_and_in_transformer_engine() -> None:
    given = {"train_iters": 1, "lr": 1e-3}
    assert not TrainConfig(**given).overlaps_products
    assert TrainConfig(**given, lora_fusion=True).overlaps_products
    assert TrainConfig(**given, transformer_impl="transformer_engine").overlaps_products
