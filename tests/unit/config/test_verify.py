"""Which layouts `verify` compares, and how they are spelled."""

from __future__ import annotations

import pytest

from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.config.parallel import ParallelConfig
from modellink_lora.config.verify import VerifyConfig, layout_name, other_layouts


def model(layers: int) -> ModelConfig:
    return ModelConfig(
        num_layers=layers, hidden_size=64, num_attention_heads=4, num_query_groups=2, max_position_embeddings=64,
        vocab_size=96, normalization="RMSNorm", swiglu=True, position_embedding_type="rope",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["dp", "tp2", "tp2,sp", "pp4", "pp2,vpp1", "tp2,sp,pp2,vpp3"])
def test_a_layout_is_read_as_it_is_named(name: str) -> None:
    (layout,) = VerifyConfig(against=(name,)).layouts()
    assert layout_name(layout, 8) == name


@pytest.mark.parametrize("text", ["tp", "tp0", "tp2;sp", "ep2", ""])
def test_what_is_no_layout_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--against"):
        VerifyConfig(against=(text,))


@pytest.mark.parametrize(
    "own, processes, layers, expected",
    [
        (ParallelConfig(), 1, 4, []),
        (ParallelConfig(2, sequence_parallel=True), 2, 4, ["dp", "tp2", "pp2", "pp2,vpp1"]),
        (ParallelConfig(), 4, 4, ["tp2", "tp2,sp", "pp4", "tp2,pp2"]),  # two groups allow no tp4
        (ParallelConfig(), 2, 5, ["tp2", "tp2,sp", "pp2"]),
    ],
)
def test_all_kinds_of_parallelism_that_fit_are_compared(
    own: ParallelConfig, processes: int, layers: int, expected: list[str]
) -> None:
    found = other_layouts(own, processes, model(layers))
    assert [layout_name(layout, processes) for layout in found] == expected
    for layout in found:
        layout.check_model(model(layers))
        layout.data_parallel_size(processes)


def test_layers_that_do_not_divide_are_spread() -> None:
    layouts = {layout_name(x, 2): x for x in other_layouts(ParallelConfig(), 2, model(5))}
    assert layouts["pp2"].num_layer_list == "3,2"
