"""What tests/distributed/test_npu_simulator.py runs on simulated NPUs: `npu_programs NAME ...`.

A program is a function. It is started by torchrun in every process and says so by failing when something is wrong.
"""

from __future__ import annotations

import logging
import os
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.distributed import npu_product
from tests.distributed.npu_product import compare

MEBI = 2**20


def collectives() -> None:
    """Every collective against its definition; the longest message takes several slots of the simulated HCCL."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for dtype in (torch.float32, torch.bfloat16, torch.int32):
        for count in (1, 7, 600_001):
            each = [(torch.arange(count) % 13 + 1 + r).to(dtype) for r in range(size)]  # small: exact in bf16
            mine = each[rank].npu()

            total = mine.clone()
            dist.all_reduce(total)
            same(total, sum(each[1:], each[0]))
            most = mine.clone()
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            same(most, each[-1])

            gathered = torch.empty(size * count, dtype=dtype, device="npu")
            dist.all_gather_into_tensor(gathered, mine)
            same(gathered, torch.cat(each))

            scattered = torch.empty(count, dtype=dtype, device="npu")
            dist.reduce_scatter_tensor(scattered, torch.cat([mine + i for i in range(size)]))
            same(scattered, sum(each[1:], each[0]) + size * rank)

            sent = mine.clone()
            dist.broadcast(sent, src=1)
            same(sent, each[1])

            exchanged = torch.empty(size * count, dtype=dtype, device="npu")
            dist.all_to_all_single(exchanged, torch.cat([mine * (i + 1) for i in range(size)]))
            same(exchanged, torch.cat([part * (rank + 1) for part in each]))
    objects: list[object] = [None] * size
    dist.all_gather_object(objects, {"rank": rank})
    assert objects == [{"rank": r} for r in range(size)], objects
    dist.barrier()


def point_to_point() -> None:
    """Blocking and batched messages; the longest is longer than the ring, both ways at once."""
    rank, size = dist.get_rank(), dist.get_world_size()
    after, before = (rank + 1) % size, (rank - 1) % size
    for count in (3, 5 * MEBI):
        each = [torch.arange(count, dtype=torch.float32) + r for r in range(size)]
        received = torch.empty(count, device="npu")
        operations = [
            dist.P2POp(dist.isend, each[rank].npu(), after),
            dist.P2POp(dist.irecv, received, before),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        same(received, each[before])
    if rank == 0:
        dist.send(torch.full((4,), 7.0, device="npu", dtype=torch.bfloat16), dst=1)
    elif rank == 1:
        received = torch.zeros(4, device="npu", dtype=torch.bfloat16)
        dist.recv(received, src=0)
        same(received, torch.full((4,), 7.0, dtype=torch.bfloat16))
    dist.barrier()


def subsets() -> None:
    """Groups of some of three processes, in another order of use on each."""
    rank = dist.get_rank()
    members = [(0, 2), (1, 2), (0, 1)]
    groups = [dist.new_group(list(ranks)) for ranks in members]
    for ranks, group in zip(members, groups, strict=True):
        if rank in ranks:
            value = torch.full((5,), float(rank + 1), device="npu")
            dist.all_reduce(value, group=group)
            same(value, torch.full((5,), float(sum(ranks) + 2)))
    dist.barrier()


def disagreement() -> None:
    """Two ranks that reduce different amounts: real HCCL would hang or corrupt memory."""
    dist.all_reduce(torch.ones(3 + dist.get_rank(), device="npu"))


def absence() -> None:
    """A collective that one rank never joins."""
    if dist.get_rank() == 0:
        dist.all_reduce(torch.ones(3, device="npu"))
    else:
        time.sleep(60)


def fused_operators() -> None:
    """torch_npu's fused operators, forward and backward, against plain PyTorch on the CPU."""
    import torch_npu  # type: ignore[import-not-found]

    generator = torch.Generator().manual_seed(1)

    def random(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    hidden = torch.ones(2048, 2048, dtype=torch.bool, device="npu").triu(1)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 3e-2)):
        x, weight, grad = random(3, 5, 16, dtype=dtype), random(16, dtype=dtype), random(3, 5, 16, dtype=dtype)
        compare(
            lambda x, w: torch_npu.npu_rms_norm(x, w, epsilon=1e-5)[0],
            lambda x, w: F.rms_norm(x, (16,), w, 1e-5),
            [x, weight], grad, tolerance,
        )  # fmt: skip
        compare(
            lambda x: torch_npu.npu_swiglu(x, dim=-1),
            lambda x: F.silu(x[..., :8]) * x[..., 8:],
            [x], grad[..., :8], tolerance,
        )  # fmt: skip
        angles = random(9, 1, 1, 8, dtype=torch.float32)
        cos, sin = (torch.cat([f, f], -1).to(dtype) for f in (angles.cos(), angles.sin()))
        compare(
            lambda x, c=cos, s=sin: torch_npu.npu_rotary_mul(x, c.npu(), s.npu()),
            lambda x, c=cos, s=sin: x * c + torch.cat([-x[..., 8:], x[..., :8]], -1) * s,
            [random(9, 2, 4, 16, dtype=dtype)], random(9, 2, 4, 16, dtype=dtype), tolerance,
        )  # fmt: skip
        for heads, groups in ((4, 4), (4, 2), (6, 1)):
            q, grad = random(2, heads, 9, 16, dtype=dtype), random(2, heads, 9, 16, dtype=dtype)
            k, v = random(2, groups, 9, 16, dtype=dtype), random(2, groups, 9, 16, dtype=dtype)
            compare(
                lambda q, k, v, n=heads: torch_npu.npu_fusion_attention(
                    q, k, v, n, "BNSD", atten_mask=hidden, scale=0.3, sparse_mode=2
                )[0],
                lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True),
                [q, k, v], grad, tolerance,
            )  # fmt: skip
    assert torch_npu.npu_dtype_cast(torch.ones(2, device="npu"), torch.bfloat16).dtype == torch.bfloat16


def random_numbers() -> None:
    """The generator's state decides dropout, also inside fused attention and its derivative."""
    import torch_npu

    torch.npu.manual_seed(5)
    x = torch.ones(64, 64, device="npu")
    state = torch.npu.get_rng_state()
    first, second = F.dropout(x, 0.5), F.dropout(x, 0.5)
    assert not torch.equal(first, second)
    torch.npu.set_rng_state(state)
    assert torch.equal(F.dropout(x, 0.5), first)
    assert 0.4 < (first == 0).float().mean().item() < 0.6
    torch.npu.manual_seed(5)
    assert torch.equal(torch.npu.get_rng_state(), state)

    # the sum of dropout(p) v over v is linear in v: its derivative applied to v gives the output back
    q, k = torch.randn(1, 2, 32, 16, device="npu"), torch.randn(1, 2, 32, 16, device="npu")
    v = torch.randn(1, 2, 32, 16, device="npu", requires_grad=True)
    out = torch_npu.npu_fusion_attention(q, k, v, 2, "BNSD", scale=0.25, keep_prob=0.8)[0]
    undropped = torch_npu.npu_fusion_attention(q, k, v, 2, "BNSD", scale=0.25)[0]
    assert not torch.allclose(out, undropped)
    weight = torch.randn_like(out)
    (grad,) = torch.autograd.grad((out * weight).sum(), v)
    torch.testing.assert_close((grad * v).sum(), (out * weight).sum(), rtol=1e-4, atol=1e-4)


def joined_products() -> None:
    """The NPU device's products with a collective inside, against plain PyTorch; what lies outside their limits."""
    from modellink_lora.device import get_device
    from tests.npu_sim.simulator import calls

    rank, size, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    device, lines = get_device("npu"), kept_lines("modellink_lora.device")
    device.activate(rank)
    calls.clear()

    def parts(*shape: int) -> list[Tensor]:
        """One matrix a rank, of -1, 0 and 1: their products of some hundred terms are exact in bf16."""
        generator = torch.Generator().manual_seed(shape[0])
        return [torch.randint(-1, 2, shape, generator=generator).bfloat16() for _ in range(size)]

    x, full, weight = parts(3, 256), parts(3 * size, 256), parts(5, 256)
    ours = [each[rank].npu() for each in (x, full, weight)]
    assert device.gather_matmul(ours[0], ours[2], group) is None and not lines, "a job has not asked for them"
    device.fused_collectives = True
    gathered = torch.cat(x)
    summed = torch.stack([(a.float() @ w.float().T) for a, w in zip(full, weight, strict=True)]).sum(0)
    for w in (ours[2], ours[2].t().contiguous().t()):
        product, p = device.gather_matmul(ours[0], w, group)
        same(p, gathered)
        same(product, (gathered.float() @ weight[rank].float().T).bfloat16())
        same(device.matmul_scatter(ours[1], w, group), summed.chunk(size)[rank].bfloat16())
    assert calls["npu::npu_all_gather_base_mm"] == calls["npu::npu_mm_reduce_scatter_base"] == 2, calls
    assert not lines, lines

    wider = torch.cat([ours[2], ours[2]], 1)[:, :256]
    outside = {
        "k is 64, outside [256, 65535)": [a[:, :64].contiguous() for a in ours],
        "dtype torch.float32": [a.float() for a in ours],
        "weight is torch.float16, x torch.bfloat16": [*ours[:2], ours[2].half()],
        "weight is a part of wider rows": [*ours[:2], wider],
        "x is a strided view": [*(torch.cat([a, a], 1)[:, :256] for a in ours[:2]), ours[2]],
        "x has 256 columns, weight 512": [*ours[:2], torch.cat([ours[2], ours[2]], 1)],
        "it has no derivative": [*ours[:2], ours[2].clone().requires_grad_()],
    }
    for reason, (a, b, w) in outside.items():
        for _ in range(2):
            assert device.gather_matmul(a, w, group) is None and device.matmul_scatter(b, w, group) is None, reason
        expected = [f"{name} is replaced by plain PyTorch: {reason}" for name in
                    ("npu_all_gather_base_mm", "npu_mm_reduce_scatter_base")]  # fmt: skip
        assert lines == expected, f"{lines} instead of {expected}"
        lines.clear()
    assert device.matmul_scatter(full[rank][:-1].npu(), ours[2], group) is None
    assert "the rows of x do not divide by 2" in lines.pop()
    assert device.gather_matmul(ours[0], ours[2], dist.new_group()) is None
    assert "a model's MC2 operators share one group" in lines.pop()
    assert calls["npu::npu_all_gather_base_mm"] == calls["npu::npu_mm_reduce_scatter_base"] == 2, calls


def kept_lines(name: str) -> list[str]:
    """What the logger `name` and those below it say from now on."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(name).addHandler(handler)
    return lines


def same(on_device: Tensor, expected: Tensor) -> None:
    assert on_device.device.type == "npu", on_device.device
    assert torch.equal(on_device.cpu(), expected), f"{on_device.cpu()[:5]} instead of {expected[:5]}"


PROGRAMS = {
    function.__name__: function
    for function in (
        npu_product.product,
        npu_product.broken_operators,
        collectives,
        point_to_point,
        subsets,
        disagreement,
        absence,
        fused_operators,
        random_numbers,
        joined_products,
    )
}


def main() -> None:
    torch.npu.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,npu:hccl")
    for name in sys.argv[1:]:
        PROGRAMS[name]()
        print(f"rank {dist.get_rank()} has done {name}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
