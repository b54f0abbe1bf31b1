"""The two laws of every layout, bit for bit: split undoes fuse, gather undoes shard."""

from __future__ import annotations

import pytest
import torch

from modellink_lora.models.layouts import (
    QKV,
    Column,
    GateUp,
    GroupedQKV,
    Layout,
    Replicated,
    Row,
    StackedGateUp,
    StackedQKV,
    Vocab,
    lora_layouts,
)

H, F, R = 24, 32, 3  # hidden, ffn, LoRA rank


def parts(*rows: int, trailing: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(rows))
    return [torch.randn(n, *trailing, generator=generator) for n in rows]


# fused layout, rows of each Hugging Face part
CASES: dict[str, tuple[Layout, tuple[int, ...]]] = {
    "qkv grouped": (QKV(8, 4, 6), (48, 24, 24)),
    "qkv multi-head": (QKV(4, 4, 6), (24, 24, 24)),
    "qkv grouped by the source": (GroupedQKV(8, 4, 6), (96,)),
    "qkv stacked by the source": (StackedQKV(8, 4, 6), (96,)),
    "gate up": (GateUp(), (F, F)),
    "gate up stacked by the source": (StackedGateUp(), (2 * F,)),
    "column": (Column(), (F,)),
    "replicated": (Replicated(), (F,)),
    "vocab": (Vocab(29, 32), (29,)),
}


@pytest.mark.parametrize("trailing", [(H,), (), (R,)], ids=["weight", "bias", "lora_B"])
@pytest.mark.parametrize("case", CASES)
def test_split_undoes_fuse(case: str, trailing: tuple[int, ...]) -> None:
    layout, rows = CASES[case]
    given = parts(*rows, trailing=trailing)
    found = layout.split(layout.fuse(given))
    assert len(found) == len(given)
    assert all(torch.equal(f, g) for f, g in zip(found, given, strict=True))


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("trailing", [(H,), (), (R,)], ids=["weight", "bias", "lora_B"])
@pytest.mark.parametrize("case", CASES)
def test_gather_undoes_shard(case: str, trailing: tuple[int, ...], tp: int) -> None:
    layout, rows = CASES[case]
    full = layout.fuse(parts(*rows, trailing=trailing))
    assert torch.equal(layout.gather([layout.shard(full, i, tp) for i in range(tp)]), full)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_gather_undoes_shard_of_rows(tp: int) -> None:
    full = torch.randn(5, F)
    assert torch.equal(Row().gather([Row().shard(full, i, tp) for i in range(tp)]), full)
    assert Row().shard(full, 0, tp).shape == (5, F // tp)


def test_a_stacked_source_makes_what_its_parts_make() -> None:
    qkv, gate_up = parts(48, 24, 24, trailing=(H,)), parts(F, F, trailing=(H,))
    assert torch.equal(StackedQKV(8, 4, 6).fuse([torch.cat(qkv)]), QKV(8, 4, 6).fuse(qkv))
    assert torch.equal(StackedGateUp().fuse([torch.cat(gate_up)]), GateUp().fuse(gate_up))


def test_a_shard_of_qkv_holds_whole_query_groups() -> None:
    q, k, v = parts(48, 24, 24, trailing=(H,))
    layout = QKV(8, 4, 6)
    half = QKV(4, 2, 6)
    second = half.split(layout.shard(layout.fuse([q, k, v]), 1, 2))
    assert torch.equal(second[0], q[24:]) and torch.equal(second[1], k[12:]) and torch.equal(second[2], v[12:])


def test_a_shard_of_gate_up_holds_both_halves() -> None:
    gate, up = parts(F, F, trailing=(H,))
    shard = GateUp().shard(GateUp().fuse([gate, up]), 1, 2)
    assert torch.equal(shard, torch.cat([gate[F // 2 :], up[F // 2 :]]))


def test_vocabulary_padding_repeats_the_last_row() -> None:
    (table,) = parts(29, trailing=(H,))
    full = Vocab(29, 32).fuse([table])
    assert full.shape == (32, H) and torch.equal(full[29:], table[-1:].expand(3, H))


def test_lora_is_cut_on_the_side_the_base_is_cut() -> None:
    assert lora_layouts(Row()) == (Row(), Replicated())
    assert lora_layouts(GateUp()) == (Replicated(), GateUp())


def test_a_width_that_does_not_divide_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        Column().shard(torch.zeros(6, 2), 0, 4)
