"""The parallel layout: how many replicas there are, and which numbers cannot be."""

from __future__ import annotations

import pytest

from modellink_lora.config.errors import UserError
from modellink_lora.config.parallel import ParallelConfig, parse_layer_list


def test_replicas_are_what_tensor_and_pipeline_ranks_leave() -> None:
    config = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    assert config.model_parallel_size == 4 and config.data_parallel_size(8) == 2


@pytest.mark.parametrize("world", [1, 6])
def test_processes_that_do_not_fill_replicas_are_refused(world: int) -> None:
    config = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    with pytest.raises(UserError, match=f"^{world} processes cannot hold .* 2 x .* 2: start a multiple of 4"):
        config.data_parallel_size(world)


@pytest.mark.parametrize(
    "name",
    ["tensor_model_parallel_size", "pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage"],
)
def test_a_size_below_one_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} 0: must be at least 1"):
        ParallelConfig(**{name: 0})


def test_a_layer_list_is_whole_numbers_of_at_least_one() -> None:
    assert parse_layer_list("6,8, 8,10") == (6, 8, 8, 10)
    with pytest.raises(UserError, match="'6;8' is not a comma list of whole numbers such as 6,8,8,10"):
        parse_layer_list("6;8")
    with pytest.raises(UserError, match="'6,0': every pipeline stage needs at least one layer"):
        parse_layer_list("6,0")
