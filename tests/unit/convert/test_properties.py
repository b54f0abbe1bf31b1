"""Of any model and layouts: there and back is every byte, merging and cutting change places, spellings agree."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from modellink_lora.checkpoint.names import from_legacy, to_legacy
from modellink_lora.convert.rows import runs_of
from modellink_lora.models.families import family_of
from modellink_lora.models.layouts import QKV, Column, GateUp, Layout, Replicated, Row, Vocab
from tests.helpers.conversion import convert, hf_tensors, random_adapter
from tests.helpers.made_family import DOCUMENTS, made_family
from tests.helpers.made_model import Dimensions, made_model

# each example converts several times: few of them, the same ones on every machine
FEW = settings(
    max_examples=12, deadline=None, derandomize=True, phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@st.composite
def sizes(draw: st.DrawFn) -> Dimensions:
    groups = draw(st.sampled_from([1, 2, 4]))
    family = draw(st.sampled_from(["llama", "qwen2", "mixtral", "qwen2_moe"]))
    return Dimensions(
        layers=draw(st.sampled_from([2, 4])),
        heads=groups * draw(st.sampled_from([1, 2, 3])),
        groups=groups,
        head_dim=draw(st.sampled_from([2, 4, 6])),
        hidden=draw(st.sampled_from([8, 12])),
        ffn=4 * draw(st.integers(1, 4)),
        vocab=draw(st.integers(5, 40)),
        tied=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        family=family,
        experts=draw(st.sampled_from([2, 4, 6])) if family in ("mixtral", "qwen2_moe") else 0,
    )


@st.composite
def layouts(draw: st.DrawFn, size: Dimensions) -> dict[str, Any]:
    """Target flags that fit the model."""
    tp = draw(st.sampled_from([t for t in (1, 2, 4) if size.groups % t == 0]))
    kind = draw(st.sampled_from(["one", "even", "list", "interleaved"]))
    stages: dict[str, Any] = {
        "one": {},
        "even": {"target_pipeline_parallel_size": 2},
        "list": {"target_pipeline_parallel_size": 2, "num_layer_list": f"1,{size.layers - 1}"},
        "interleaved": {"target_pipeline_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
    }[kind]
    spelling: dict[str, Any] = draw(st.sampled_from([{"use_mcore_models": True}, {"save_to_legacy": True}]))
    if size.experts:
        divisors = [ep for ep in (1, 2, 3, 4) if size.experts % ep == 0]
        spelling = {"use_mcore_models": True, "target_expert_parallel_size": draw(st.sampled_from(divisors))}
    padding = draw(st.sampled_from([{}, {"make_vocab_size_divisible_by": 8}]))
    workers = {"workers": draw(st.sampled_from([1, 3]))}
    return {"target_tensor_parallel_size": tp, **stages, **spelling, **padding, **workers}


def same_bytes(a: Path, b: Path) -> bool:
    x, y = hf_tensors(a), hf_tensors(b)
    return x.keys() == y.keys() and all(
        x[n].dtype == y[n].dtype and torch.equal(x[n].view(torch.uint8), y[n].view(torch.uint8)) for n in y
    )


@FEW
@given(st.data())
def test_there_over_two_layouts_and_back_is_every_byte(data: st.DataObject) -> None:
    size = data.draw(sizes())
    first, second = data.draw(layouts(size)), data.draw(layouts(size))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = made_model(root / "source", size)
        convert(source, root / "a", to="mg", **first)
        convert(root / "a", root / "b", to="mg", **second)
        convert(root / "b", root / "out", to="hf", verify=True)
        assert same_bytes(root / "out/mg2hg", source)


@FEW
@given(st.data())
def test_there_and_back_is_every_byte_in_every_family(data: st.DataObject) -> None:
    drawn = data.draw(sizes())
    size = dataclasses.replace(
        drawn, family=data.draw(st.sampled_from(sorted(DOCUMENTS))), experts=0, head_dim=4 * drawn.head_dim
    )
    layout = data.draw(layouts(size))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = made_family(root / "source", size)
        convert(source, root / "a", to="mg", **layout)
        convert(root / "a", root / "out", to="hf")
        assert same_bytes(root / "out/mg2hg", source)


@FEW
@given(st.data())
def test_merging_and_cutting_change_places(data: st.DataObject) -> None:
    size = data.draw(sizes())
    first, second = data.draw(layouts(size)), data.draw(layouts(size))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = made_model(root / "source", size)
        adapter = random_adapter(root / "adapter", source, r=data.draw(st.sampled_from([1, 3, 8])))
        convert(source, root / "whole", to="hf", lora_load=str(adapter))
        convert(source, root / "a", to="mg", **first)
        convert(root / "a", root / "b", to="mg", lora_load=str(adapter), **second)
        convert(root / "b", root / "out", to="hf")
        assert same_bytes(root / "out/mg2hg", root / "whole/mg2hg")


@given(st.sampled_from(["llama", "qwen2", "qwen3"]), st.integers(0, 200), st.booleans())
def test_the_two_spellings_are_one_to_one(family: str, layer: int, tied: bool) -> None:
    names = [row.name.replace("*", str(layer)) for row in family_of(family).rows]
    paths = [to_legacy(name, tied=tied) for name in names]
    assert [from_legacy(path) for path in paths] == names and len(set(paths)) == len(names)


@st.composite
def arranged(draw: st.DrawFn) -> tuple[Layout, Layout, int, int]:
    """(layout of the source, of the result, rows, TP that divides them)."""
    tp, block = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 3))
    groups, per_group, head_dim = tp * draw(st.integers(1, 2)), draw(st.integers(1, 3)), block
    rows = draw(st.integers(1, 20))
    padded = [-(-rows // tp) * tp + extra * tp for extra in (draw(st.integers(0, 2)), draw(st.integers(0, 2)))]
    qkv = QKV(groups * per_group, groups, head_dim)
    return draw(st.sampled_from([
        (Column(), Column(), tp * block, tp), (GateUp(), GateUp(), 2 * tp * block, tp), (Row(), Row(), tp * block, tp),
        (Replicated(), Replicated(), block, tp), (qkv, qkv, groups * (per_group + 2) * head_dim, tp),
        (Vocab(rows, padded[0]), Vocab(rows, padded[1]), padded[0], tp),
    ]))  # fmt: skip


@given(arranged(), st.integers(0, 3), st.sampled_from([1, 2]))
def test_runs_say_where_every_row_comes_from(case: tuple[Layout, Layout, int, int], rank: int, dimensions: int) -> None:
    before, after, rows, tp = case
    dimensions = 2 if isinstance(before, Row) else dimensions
    shape = (3, rows) if isinstance(before, Row) else (rows, 3)[:dimensions]
    full = torch.randn(shape)
    shards = [before.shard(full, i, tp) for i in range(tp)]
    rank %= tp
    dim = 1 if isinstance(before, Row) else 0
    runs = runs_of([shard.shape[dim] for shard in shards], dimensions, join=before.gather, layout=after,
                   pick=lambda tensor: after.shard(tensor, rank, tp))  # fmt: skip
    again = after.fuse([full]) if isinstance(after, Vocab) and after.padded != rows else full
    expected = after.shard(again, rank, tp)
    pieces = [shards[run.part].narrow(dim, run.source, run.length) for run in runs.runs]
    assert torch.equal(torch.cat(pieces, dim=dim), expected) and runs.dim == dim and runs.size == expected.shape[dim]
    whole = [again.narrow(dim, run.full, run.length) for run in runs.runs]
    assert torch.equal(torch.cat(whole, dim=dim), expected)
