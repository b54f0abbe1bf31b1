"""Layers over pipeline stages: every layer has exactly one place, and names travel there and back."""

from __future__ import annotations

import pytest

from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.families import family_of
from modellink_lora.parallel.partition import Partition

PARTITIONS = [Partition.of(8, 1), Partition.of(8, 4), Partition.of(8, 8), Partition.of(8, 3, (1, 5, 2))]
INTERLEAVED = [Partition.of(8, 2, per_chunk=2), Partition.of(8, 2, per_chunk=1), Partition.of(8, 4, per_chunk=1)]
UNTIED = ModelConfig(
    num_layers=8, hidden_size=64, num_attention_heads=4, ffn_hidden_size=128, max_position_embeddings=128,
    vocab_size=259, normalization="RMSNorm", swiglu=True, position_embedding_type="rope",
    untie_embeddings_and_output_weights=True,
)  # fmt: skip


@pytest.mark.parametrize("partition", PARTITIONS, ids=str)
def test_every_layer_is_on_one_stage_and_stages_are_consecutive(partition: Partition) -> None:
    stages = [list(partition.layers(stage)) for stage in range(partition.stages)]
    assert [layer for stage in stages for layer in stage] == list(range(8))
    assert tuple(map(len, stages)) == partition.counts


@pytest.mark.parametrize("partition", PARTITIONS, ids=str)
def test_every_tensor_of_a_model_is_held_by_one_stage(partition: Partition) -> None:
    names = [spec.name for spec in family_of("llama").tensors(UNTIED)]
    for name in names:
        assert sum(partition.holds(name, stage) for stage in range(partition.stages)) == 1, name
    last = partition.stages - 1
    assert partition.holds("embedding.word_embeddings.weight", 0)
    assert partition.holds("decoder.final_layernorm.weight", last) and partition.holds("output_layer.weight", last)


@pytest.mark.parametrize("partition", PARTITIONS, ids=str)
def test_local_names_begin_at_zero_and_lead_back(partition: Partition) -> None:
    for stage in range(partition.stages):
        for local, layer in enumerate(partition.layers(stage)):
            name = f"decoder.layers.{layer}.mlp.linear_fc1.lora_A"
            assert partition.to_local(name, stage) == f"decoder.layers.{local}.mlp.linear_fc1.lora_A"
            assert partition.to_global(partition.to_local(name, stage), stage) == name
        assert partition.to_global("output_layer.weight", stage) == "output_layer.weight"


def test_layers_that_do_not_divide_are_answered_with_a_list_that_works() -> None:
    with pytest.raises(UserError, match=r"5 layers do not divide over 2 pipeline stages.*--num-layer-list 3,2"):
        Partition.of(5, 2)
    assert Partition.of(5, 2, (3, 2)).counts == (3, 2)


@pytest.mark.parametrize(
    ("stages", "counts", "message"),
    [
        (2, (3, 3), "--num-layer-list 3,3 sums to 6, the model has 5 layers"),
        (3, (3, 2), "--num-layer-list 3,2 names 2 stages, the layout has 3"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(stages: int, counts: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Partition.of(5, stages, counts)


def places(partition: Partition) -> list[tuple[int, int]]:
    return [(stage, chunk) for stage in range(partition.stages) for chunk in range(partition.chunks)]


@pytest.mark.parametrize("partition", INTERLEAVED, ids=str)
def test_interleaved_stages_hold_every_layer_and_tensor_once(partition: Partition) -> None:
    held = [layer for place in places(partition) for layer in partition.layers(*place)]
    assert sorted(held) == list(range(8))
    for name in [spec.name for spec in family_of("llama").tensors(UNTIED)]:
        (place,) = [place for place in places(partition) if partition.holds(name, *place)]
        assert partition.to_global(partition.to_local(name, *place), *place) == name
    assert partition.holds("embedding.word_embeddings.weight", 0, 0)
    assert partition.holds("output_layer.weight", partition.stages - 1, partition.chunks - 1)


def test_a_stage_holds_every_other_run_as_megatron_lays_them_out() -> None:
    # 8 layers, 2 stages, runs of 2: stage 0 has 0 1 and 4 5
    partition = Partition.of(8, 2, per_chunk=2)
    assert [list(partition.layers(stage, chunk)) for stage in (0, 1) for chunk in (0, 1)] == [
        [0, 1], [4, 5], [2, 3], [6, 7],
    ]  # fmt: skip
    assert (
        partition.to_local("decoder.layers.5.mlp.linear_fc1.weight", 0, 1) == "decoder.layers.1.mlp.linear_fc1.weight"
    )
    assert partition.describe() == "2x2,2x2" and partition.layers_of_stage(1) == 4


@pytest.mark.parametrize(
    ("layers", "stages", "settings", "message"),
    [
        (8, 1, {"per_chunk": 2}, "needs --pipeline-model-parallel-size above 1"),
        (8, 2, {"per_chunk": 3}, "--num-layers-per-virtual-pipeline-stage 3 does not divide the 4 layers of a stage"),
        (8, 2, {"per_chunk": 2, "layer_list": (4, 4)}, "exclude each other"),
    ],
)
def test_runs_that_do_not_fit_are_refused(layers: int, stages: int, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Partition.of(layers, stages, **settings)
