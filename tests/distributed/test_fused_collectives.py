"""Products joined with a collective over symmetric memory, on two processes: PyTorch's operators, its own CPU kernels.

PyTorch registers a plain implementation of each of these operators for tensors without data. It works on CPU tensors
too, so that names, argument order, shapes and numbers are those of the real operators; the GPU kernels are not run.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from tests.helpers.spawn import run

N, K, M = 3, 20, 5


def parts(ranks: int, *shape: int, dtype: torch.dtype) -> list[Tensor]:
    """A matrix for each rank; of small integers, whose products are exact in every dtype."""
    generator = torch.Generator().manual_seed(shape[0])
    return [torch.randint(-2, 3, shape, generator=generator).to(dtype) for _ in range(ranks)]


@functools.cache
def give_the_cpu_kernels() -> None:
    import torch.distributed._symmetric_memory as symmetric

    for name in ("fused_all_gather_matmul", "fused_matmul_reduce_scatter"):
        torch.library.impl(f"symm_mem::{name}", "cpu", getattr(symmetric, f"_{name}_fallback"))


def products(dtype: torch.dtype) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """(found, expected) of both operators, for a contiguous, a transposed and a strided weight."""
    import torch.distributed as dist

    from modellink_lora.device.symmetric_memory import gather_matmul, matmul_scatter

    give_the_cpu_kernels()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x, full, weight = (parts(ranks, *shape, dtype=dtype) for shape in ((N, K), (ranks * N, K), (M, K)))
    gathered = torch.cat(x)
    summed = torch.stack([a @ w.T for a, w in zip(full, weight, strict=True)]).sum(0)
    w = weight[rank]
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for kind, view in {
        "plain": w,
        "transposed": w.t().contiguous().t(),
        "strided": torch.cat([w, w], 1)[:, :K],
    }.items():
        joined = gather_matmul(x[rank], view, dist.group.WORLD, device_type="cpu")
        scattered = matmul_scatter(full[rank], view, dist.group.WORLD, device_type="cpu")
        assert joined is not None and scattered is not None
        found[kind] = [(joined[0], gathered @ w.T), (joined[1], gathered), (scattered, summed.chunk(ranks)[rank])]
    return found


def refusals() -> list[str]:
    """The lines that are written when each limit is passed, twice."""
    import torch.distributed as dist

    from modellink_lora.device.cuda import CudaDevice
    from modellink_lora.device.symmetric_memory import gather_matmul, matmul_scatter

    give_the_cpu_kernels()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("modellink_lora.device")
    logger.addHandler(handler)
    group, device = dist.group.WORLD, CudaDevice()
    x, w = torch.ones(4, K), torch.ones(M, K)
    assert device.gather_matmul(x, w, group) is None and not lines, "a job has not asked for them"
    device.fused_collectives = True
    for _ in range(2):
        assert device.gather_matmul(x, w, group) is None and device.matmul_scatter(x, w, group) is None
        assert gather_matmul(x.double(), w.double(), group, device_type="cpu") is None
        assert gather_matmul(x.t(), w[:, :4], group, device_type="cpu") is None
        assert matmul_scatter(x[:3], w, group, device_type="cpu") is None
        alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        assert gather_matmul(x, w, alone, device_type="cpu") is None
    logger.removeHandler(handler)
    return lines


def test_both_equal_a_collective_and_a_product_for_any_strides_of_the_weight() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for rank, found in enumerate(run(products, world_size=2, dtype=dtype)):
            for kind, pairs in found.items():
                for number, (result, expected) in enumerate(pairs):
                    assert torch.equal(result, expected), (dtype, rank, kind, number)


def test_outside_the_limits_nothing_is_computed_and_each_reason_is_said_once() -> None:
    gather, scatter = (f"{name} is replaced by plain PyTorch: " for name in
                       ("fused_all_gather_matmul", "fused_matmul_reduce_scatter"))  # fmt: skip
    for lines in run(refusals, world_size=2):
        assert lines == [
            gather + "x is on cpu",
            scatter + "x is on cpu",
            gather + "dtype torch.float64",
            gather + "x is a strided view",
            scatter + "the rows of x do not divide by 2",
            gather + "the group has one rank",
        ]
