"""Programs of tests/distributed/npu_programs.py about modellink_lora's NPU device and its fused operators."""

from __future__ import annotations

import gc
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MEBI = 2**20
FUSED = {"npu_rms_norm", "npu_swiglu", "npu_rotary_mul", "npu_fusion_attention"}


def product() -> None:
    """What the device says about itself, fused paths against its reference, fallbacks, the switch."""
    from modellink_lora.device import get_device
    from modellink_lora.device.base import Device
    from modellink_lora.device.npu import NpuDevice
    from tests.npu_sim.simulator import calls

    device = get_device("auto")
    assert isinstance(device, NpuDevice), device
    assert device.activate(dist.get_rank()) == torch.device("npu", dist.get_rank())
    assert device.plain == {}, device.plain
    about = device.describe()
    assert "Ascend910B1" in about and "torch_npu 2.13.0" in about, about
    assert about.endswith("fused operators: npu_rms_norm, npu_swiglu, npu_rotary_mul, npu_fusion_attention"), about
    assert device.supports(torch.bfloat16)
    device.seed(3)
    drawn = torch.rand(4, device="npu")
    device.seed(3)
    assert torch.equal(torch.rand(4, device="npu"), drawn)
    gc.collect()  # what the check at the start has left
    device.reset_peak_memory()
    before, free = device.memory(), device.free_memory()
    block = torch.empty(MEBI, device="npu")
    grown = {name: value - before[name] for name, value in device.memory().items()}
    rounding = 4096  # the allocator's
    assert block.nbytes <= grown["allocated"] <= grown["max allocated"] < block.nbytes + rounding, grown
    assert block.nbytes <= free - device.free_memory() < block.nbytes + rounding
    device.synchronize()

    generator = torch.Generator().manual_seed(2)

    def random(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def all_paths(dtype: torch.dtype, tolerance: float) -> None:
        for causal in (True, False):
            shapes = [random(2, heads, 7, 8, dtype=dtype) for heads in (4, 2, 2)]
            compare(
                lambda q, k, v, c=causal: device.attention(q, k, v, causal=c, scale=0.4),
                lambda q, k, v, c=causal: Device.attention(device, q, k, v, causal=c, scale=0.4),
                shapes, random(2, 4, 7, 8, dtype=dtype), tolerance,
            )  # fmt: skip
        where = torch.tensor([[3, 5, 8], [0, 8, 1]])  # among 9 keys
        shapes = [random(2, heads, tokens, 8, dtype=dtype) for heads, tokens in ((4, 3), (2, 9), (2, 9))]
        compare(
            lambda q, k, v: device.attention(q, k, v, causal=True, scale=0.4, where=where.npu()),
            lambda q, k, v: Device.attention(device, q, k, v, causal=True, scale=0.4, where=where),
            shapes, random(2, 4, 3, 8, dtype=dtype), tolerance,
        )  # fmt: skip
        compare(
            lambda x, w: device.rms_norm(x, w, 1e-6),
            lambda x, w: Device.rms_norm(device, x, w, 1e-6),
            [random(6, 2, 32, dtype=dtype), random(32, dtype=dtype)], random(6, 2, 32, dtype=dtype), tolerance,
        )  # fmt: skip
        compare(
            device.swiglu, lambda x: Device.swiglu(device, x),
            [random(6, 2, 32, dtype=dtype)], random(6, 2, 16, dtype=dtype), tolerance,
        )  # fmt: skip
        for interleaved in (False, True):
            for channels in (16, 8):  # all of a head, or the first
                rotations(interleaved, channels, dtype, tolerance)

    def rotations(interleaved: bool, channels: int, dtype: torch.dtype, tolerance: float) -> None:
        import megatron.core.models.common.embeddings.rope_utils as rope

        half = random(9, 1, 1, channels // 2, dtype=torch.float32)
        angles = half.repeat_interleave(2, -1) if interleaved else torch.cat((half, half), -1)
        megatron = rope._apply_rotary_pos_emb_bshd
        compare(  # as megatron-core's attention calls it, redirected, and as it is
            lambda x: megatron(x, angles.npu(), rotary_interleaved=interleaved, mscale=1.0),
            lambda x: megatron.__wrapped__(x, angles, rotary_interleaved=interleaved),
            [random(9, 2, 3, 16, dtype=dtype)], random(9, 2, 3, 16, dtype=dtype), tolerance,
        )  # fmt: skip

    expected = {"npu_fusion_attention": 3, "npu_rms_norm": 1, "npu_swiglu": 1, "npu_rotary_mul": 8}
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 3e-2)):
        calls.clear()
        all_paths(dtype, tolerance)
        assert {name: calls[f"npu::{name}"] for name in expected} == expected, calls

    # more heads than the fused operator takes, a strided gate: the reference answers
    calls.clear()
    many = [random(1, 257, 3, 4, dtype=torch.float32) for _ in range(3)]
    compare(
        lambda q, k, v: device.attention(q, k, v, causal=True, scale=0.5),
        lambda q, k, v: Device.attention(device, q, k, v, causal=True, scale=0.5),
        many, random(1, 257, 3, 4, dtype=torch.float32), 2e-5,
    )  # fmt: skip
    wide = random(2, 6, dtype=torch.float32)
    compare(
        lambda x: device.swiglu(x[:, :4]), lambda x: Device.swiglu(device, x[:, :4]),
        [wide], random(2, 2, dtype=torch.float32), 2e-5,
    )  # fmt: skip
    assert not any(calls[f"npu::{name}"] for name in FUSED), calls

    for left_out in (["npu_swiglu", "npu_rotary_mul"], ["all"]):
        device.leave_out(left_out)
        calls.clear()
        all_paths(torch.float32, 2e-5)
        used = {name for name in FUSED if calls[f"npu::{name}"]}
        assert used == (FUSED - set(left_out) if left_out != ["all"] else set()), used
    assert "fused operators: none; not npu_swiglu: --npu-plain-operators" in device.describe(), device.describe()


def broken_operators() -> None:
    """An operator that this CANN lacks, and one that computes something else, are found out before the run."""
    from modellink_lora.device import get_device

    def absent(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("aclnnRmsNorm or aclnnRmsNormGetWorkspaceSize not in libopapi.so\nsecond line")

    def swapped(x: Tensor, dim: int = -1) -> Tensor:
        up, gate = x.chunk(2, dim)
        return torch.nn.functional.silu(gate) * up

    broken = torch.library.Library("npu", "IMPL")
    broken.impl("npu_rms_norm", absent, "PrivateUse1", allow_override=True)
    broken.impl("npu_swiglu", swapped, "PrivateUse1", allow_override=True)
    device = get_device("npu")
    device.activate(dist.get_rank())
    assert list(device.plain) == ["npu_rms_norm", "npu_swiglu"], device.plain
    assert device.plain["npu_rms_norm"] == (
        "fails here (aclnnRmsNorm or aclnnRmsNormGetWorkspaceSize not in libopapi.so)"
    )
    assert "differs from plain PyTorch by" in device.plain["npu_swiglu"]
    about = device.describe()
    assert "fused operators: npu_rotary_mul, npu_fusion_attention; not npu_rms_norm: fails here" in about, about
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    normed = device.rms_norm(x.npu(), torch.ones(8).npu(), 1e-6)
    torch.testing.assert_close(normed.cpu(), torch.nn.functional.rms_norm(x, (8,), eps=1e-6))


def compare(on_npu, on_cpu, inputs: list[Tensor], grad: Tensor, tolerance: float) -> None:  # type: ignore[no-untyped-def]
    """Outputs and gradients of two functions of the same inputs, one on each device."""
    theirs = [x.clone().requires_grad_() for x in inputs]
    ours = [x.npu().requires_grad_() for x in inputs]
    expected, actual = on_cpu(*theirs), on_npu(*ours)
    torch.testing.assert_close(actual.cpu(), expected, rtol=tolerance, atol=tolerance)
    expected.backward(grad)
    actual.backward(grad.npu())
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(
            mine.grad.cpu(), other.grad, rtol=tolerance, atol=tolerance * 4, msg=lambda text, i=i: f"input {i}: {text}"
        )
