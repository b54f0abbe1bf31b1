"""Merging: one rounding, the same bits for every layout and block."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from modellink_lora.adapters.merge import Factors, merge, merge_into, round_once
from modellink_lora.config.errors import UserError
from modellink_lora.models.layouts import Column, GateUp, Row, lora_layouts

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def factors(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(48, 40, generator=generator) * 0.02
    return weight.to(dtype), torch.randn(5, 40, generator=generator), torch.randn(48, 5, generator=generator) * 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_block_size_leaves_no_trace(rows: int, dtype: torch.dtype) -> None:
    weight, a, b = factors(dtype)
    assert torch.equal(merge(weight, a, b, 2.0, rows=rows), merge(weight, a, b, 2.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [Column(), Row(), GateUp()])
@pytest.mark.parametrize("tp", [2, 4])
def test_shards_merge_to_the_shards_of_the_merged(tp: int, layout: Column | Row | GateUp, dtype: torch.dtype) -> None:
    weight, a, b = factors(dtype)
    a_layout, b_layout = lora_layouts(layout)
    shards = [
        merge(layout.shard(weight, i, tp), a_layout.shard(a, i, tp), b_layout.shard(b, i, tp), 2.0) for i in range(tp)
    ]
    assert torch.equal(layout.gather(shards), merge(weight, a, b, 2.0))


def test_a_small_update_is_not_lost_as_by_adding_rounded_products() -> None:
    weight, a, b = factors(torch.float32)
    expected = weight.double() + 2.0 * (b.double() @ a.double())
    assert ((merge(weight, a, b, 2.0).double() - expected).abs() <= 2**-24 * expected.abs()).all()


@pytest.mark.parametrize("dtype, bits", [(torch.bfloat16, 8), (torch.float16, 11)])
def test_rounding_is_correct_where_two_roundings_are_not(dtype: torch.dtype, bits: int) -> None:
    tie = 1 + 2.0**-bits  # halfway between 1 and its neighbour
    just_above, just_below = tie + 2.0**-40, tie - 2.0**-40
    step = 2.0 ** (1 - bits)
    found = round_once(torch.tensor([tie, just_above, just_below, -just_above], dtype=torch.float64), dtype)
    assert found.double().tolist() == [1.0, 1.0 + step, 1.0, -1.0 - step]
    assert torch.tensor(just_above, dtype=torch.float64).to(dtype).item() == 1.0, "torch rounds twice"


@pytest.mark.parametrize("dtype, bits", [(torch.bfloat16, 8), (torch.float16, 11)])
def test_rounding_is_to_the_nearest(dtype: torch.dtype, bits: int) -> None:
    x = torch.randn(2000, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for value, rounded in zip(x.tolist(), round_once(x, dtype).double().tolist(), strict=True):
        exponent = torch.frexp(torch.tensor(value, dtype=torch.float64)).exponent.item()
        half_step = Fraction(2) ** (int(exponent) - bits) / 2
        assert abs(Fraction(rounded) - Fraction(value)) <= half_step


def by_definition(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """Rank by rank in fp64, rounded once: slow and plain."""
    exact = torch.zeros(weight.shape, dtype=torch.float64)
    for k in range(len(a)):
        exact += b[:, k : k + 1].double() * a[k : k + 1].double()
    return round_once(exact * scaling + weight.double(), weight.dtype)


def _cases() -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(W in fp32, A, B) where a sum in another order could be rounded otherwise."""
    g = torch.Generator().manual_seed(3)
    a, b = torch.randn(16, 200, generator=g), torch.randn(300, 16, generator=g)
    sixteenths = [torch.randint(-40, 41, shape, generator=g) / 16 for shape in ((300, 200), (5, 200), (300, 5))]
    return {
        "as trained": (torch.randn(300, 200, generator=g) * 0.02, a, b * 0.01),
        "16-bit factors": (torch.randn(300, 200, generator=g), a.bfloat16(), (b * 0.1).bfloat16()),
        "many exact ties": (sixteenths[0], sixteenths[1], sixteenths[2]),
        "the update cancels the weight": (-(b @ a), a, b),
        "below the normal range": (torch.randn(300, 200, generator=g) * 1e-39, a * 1e-20, b * 1e-20),
        "nothing but zeros": (torch.zeros(300, 200), a, torch.zeros(300, 16)),
        "large": (torch.randn(300, 200, generator=g), a * 30, b * 30),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", list(_cases()))
def test_the_fast_way_gives_the_bits_of_the_definition(case: str, dtype: torch.dtype) -> None:
    weight, a, b = _cases()[case]
    for scaling in (1.0, 0.7):
        expected = by_definition(weight.to(dtype), a, b, scaling)
        assert torch.equal(merge(weight.to(dtype), a, b, scaling), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_that_another_order_rounds_otherwise_is_found(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a matrix product made worse on purpose, within its bound, the result is still that of the definition."""
    weight, a, b = _cases()["many exact ties"]
    product = torch.mm

    def worse(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        product(x, y, out=out)
        return out.mul_(1 + 2.0**-52)

    expected = by_definition(weight.to(dtype), a, b, 0.5)
    monkeypatch.setattr(torch, "mm", worse)
    assert torch.equal(merge(weight.to(dtype), a, b, 0.5), expected)
    monkeypatch.setattr("modellink_lora.adapters.merge._doubtful", lambda *_: None)
    assert not torch.equal(merge(weight.to(dtype), a, b, 0.5), expected), "the worse product would have shown"


def test_what_changed_is_measured() -> None:
    weight, a, b = factors(torch.bfloat16)
    result = torch.empty_like(weight)
    change = merge_into(result, weight, Factors(a, b, 2.0), slice(0, 48), rows=7)
    update = 2.0 * (b.double() @ a.double())
    rounding = result.double() - (weight.double() + update)
    assert change.largest == pytest.approx(update.abs().max().item())
    assert change.worst_rounding == pytest.approx(rounding.abs().max().item())
    sums = [tensor.square().sum().item() for tensor in (weight.double(), update, rounding)]
    assert [change.weight, change.update, change.lost] == pytest.approx(sums)


def test_a_result_that_does_not_fit_is_refused() -> None:
    weight = torch.full((1, 1), 60000.0, dtype=torch.float16)
    with pytest.raises(UserError, match="does not fit"):
        merge(weight, torch.ones(1, 1), torch.full((1, 1), 10000.0), 1.0)
