"""What tests/distributed/test_npu_operators.py runs on the null device: operators that do nothing.

`npu_null NAME ...` runs the functions of these names. All values on the device are garbage: only shapes, dtypes, errors
and the list of launched operators mean something.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import sys
import tempfile
import traceback
import types
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch_npu  # type: ignore[import-not-found]
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from modellink_lora.device import Device, fused_npu, get_device
from modellink_lora.device.base import softmax_attention
from tests.helpers.npu_calls import Use, uses

# What we mean by the arguments that we pass by position. torch_npu's schemas have other names than its documentation.
POSITIONS = {
    "npu_rms_norm": ("self", "gamma"),
    "npu_swiglu": ("self",),
    "npu_rotary_mul": ("self", "r1", "r2", "rotary_mode"),
    "npu_fusion_attention": ("query", "key", "value", "head_num", "input_layout"),
    "npu_all_gather_base_mm": ("self", "x2", "hcom", "world_size"),
    "npu_mm_reduce_scatter_base": ("self", "x2", "hcom", "world_size"),
}
PAIR = types.SimpleNamespace(size=lambda: 2)  # stands for a group of two ranks: the operators are told name and size


# ---- T1: the live schemas, and torch_npu's own meta kernels


def bindings() -> None:
    """Every use of torch_npu in the package fits the operator's schema, or the Python function, of this wheel."""
    found = uses()
    operators = [use for use in found if use.root == "torch_npu" and use.name.startswith("npu_")]
    for use in operators:
        problem = misfit(use, getattr(torch.ops.npu, use.name).default._schema)
        assert not problem, f"{use.where}: {use.name}: {problem}"
    for use in found:
        if use in operators:
            continue
        root = torch_npu if use.root == "torch_npu" else torch.npu
        meant = functools.reduce(getattr, use.name.split("."), root)  # raises where it does not exist
        if use.called:
            inspect.signature(meant).bind(*[None] * use.positional, **dict.fromkeys(use.keywords))
    assert hasattr(torch_npu._C._distributed_c10d.ProcessGroupHCCL, "get_hccl_comm_name")
    print("operators", " ".join(sorted({use.name for use in operators})))


def misfit(use: Use, schema: Any) -> str:
    """How a call differs from a schema; empty if it fits."""
    by_position = ["self" if a.name == "input" else a.name for a in schema.arguments if not a.kwarg_only]
    given = by_position[: use.positional]
    if tuple(given) != POSITIONS[use.name]:
        return f"positional arguments are {given}"
    known = {a.name for a in schema.arguments}
    unknown = set(use.keywords) - known
    missing = [
        a.name for a in schema.arguments[use.positional :] if not (a.has_default_value() or a.name in use.keywords)
    ]
    return f"unknown {unknown}" if unknown else f"missing {missing}" if missing else ""


def fakes() -> None:
    """Each function of fused_npu on fake NPU tensors: outputs and gradients are like the plain implementation's."""
    called = recorded()
    alone(ranks=2)
    with FakeTensorMode(), contextlib.ExitStack() as modes:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for name, (fused, plain, shapes) in pairs(dtype).items():
                ours, theirs = (results(f, [fresh(s, dtype) for s in shapes]) for f in (fused, plain))
                assert ours == theirs, f"{name} in {dtype}: {ours} instead of {theirs}"
        modes.enter_context(torch.no_grad())
        x, weight, full = fresh((32, 512)), fresh((64, 512)), fresh((64, 512))
        product, gathered = fused_npu.gather_matmul(x, weight, PAIR)
        assert like(product) == like(fresh((64, 512)) @ weight.t()) and like(gathered) == like(fresh((64, 512)))
        assert like(fused_npu.matmul_scatter(full, weight, PAIR)) == like((full @ weight.t())[:32])
    fused_npu._compressed_mask.cache_clear()  # a fake one
    print("called", " ".join(sorted(called)))


def pairs(dtype: torch.dtype) -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]]:
    """Name -> what fused_npu does, the same in plain PyTorch, shapes of the inputs."""
    device = get_device("npu")
    angles = fresh((16, 1, 1, 64), torch.float32)
    places = torch.zeros(2, 3, dtype=torch.int64, device="npu:0")
    heads, groups = (2, 8, 16, 128), (2, 4, 16, 128)

    def turned(interleaved: bool) -> Callable[[Tensor], Tensor]:
        return lambda x: fused_npu.rotary(x, angles, interleaved=interleaved, reference=refused)

    def attention(causal: bool) -> Callable[..., Tensor]:
        return lambda q, k, v: fused_npu.attention(q, k, v, causal=causal, scale=0.1, reference=refused)

    def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return softmax_attention(q, k, v, causal=False, scale=0.1)

    return {
        "rms_norm": (
            lambda x, w: fused_npu.rms_norm(x, w, 1e-5, reference=refused),
            lambda x, w: Device.rms_norm(device, x, w, 1e-5),
            [(16, 2, 512), (512,)],
        ),
        "swiglu": (
            lambda x: fused_npu.swiglu(x, reference=refused),
            lambda x: Device.swiglu(device, x),
            [(16, 2, 512)],
        ),
        "rotary": (turned(False), lambda x: x * 1, [(16, 2, 8, 64)]),
        "rotary of some channels": (turned(False), lambda x: x * 1, [(16, 2, 8, 96)]),
        "rotary of neighbours": (turned(True), lambda x: x * 1, [(16, 2, 8, 64)]),
        "attention": (attention(False), plain_attention, [heads, heads, heads]),
        "attention from positions": (
            lambda q, k, v: fused_npu.attention(q, k, v, causal=True, scale=0.1, where=places, reference=refused),
            plain_attention,
            [(2, 8, 3, 128), groups, groups],
        ),
        "causal attention of groups": (attention(True), plain_attention, [heads, groups, groups]),
    }


def results(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[tuple[Any, ...]]:
    """Shape, dtype and device of the output and of every input's gradient."""
    inputs = [x.requires_grad_() for x in inputs]
    out = function(*inputs)
    return [like(out), *map(like, torch.autograd.grad(out, inputs, torch.ones_like(out)))]


def like(x: Tensor) -> tuple[Any, ...]:
    return tuple(x.shape), x.dtype, x.device


def fresh(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="npu:0")


def refused(*args: object, **kwargs: object) -> Tensor:
    raise AssertionError("arguments within the operator's limits were refused")


def recorded() -> set[str]:
    """Names of torch_npu's operators that are called from now on."""
    called: set[str] = set()

    def noting(name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            called.add(name)
            return operator(*args, **kwargs)

        return call

    for name in vars(torch_npu):
        if name.startswith("npu_"):
            setattr(torch_npu, name, noting(name, getattr(torch_npu, name)))
    return called


def alone(ranks: int) -> None:
    """One process answers for a group of `ranks`: their hosts and HCCL's name of the group need no other process."""
    PAIR.size = lambda: ranks
    fused_npu.domain_limits = lambda group: ()
    fused_npu._domain = lambda group: "hcom"


# ---- T2: torch_npu's C++


def refusals() -> None:
    """What torch_npu's C++ refuses, fused_npu has refused before, in one line, and what it lets through is launched."""
    alone(ranks=2)
    x, w, odd, narrow = fresh((32, 512)), fresh((64, 512)), fresh((33, 512)), fresh((64, 256))
    q = fresh((2, 4, 16, 64))
    cases: list[tuple[str, tuple[str, ...], Callable[[], Any]]] = [
        ("K-axis in the two inputs of Matmul must be equal", fused_npu.mc2_limits(x, narrow, ranks=2, scatter=False),
         lambda: torch_npu.npu_all_gather_base_mm(x, narrow.t(), "hcom", 2)),
        ("required to be 2D", fused_npu.mc2_limits(fresh((4, 8, 512)), w, ranks=2, scatter=False),
         lambda: torch_npu.npu_all_gather_base_mm(fresh((4, 8, 512)), w.t(), "hcom", 2)),
        ("world_size should be in [2, 4, 8, 16, 32]", fused_npu.mc2_limits(x, w, ranks=3, scatter=False),
         lambda: torch_npu.npu_all_gather_base_mm(x, w.t(), "hcom", 3)),
        ("divisible by world_size", fused_npu.mc2_limits(odd, w, ranks=2, scatter=True),
         lambda: torch_npu.npu_mm_reduce_scatter_base(odd, w.t(), "hcom", 2)),
        ("K-axis", fused_npu.mc2_limits(x, narrow, ranks=2, scatter=True),
         lambda: torch_npu.npu_mm_reduce_scatter_base(x, narrow.t(), "hcom", 2)),
        ("head_num must > 0", fused_npu.attention_limits(q[:, :0], q[:, :0], q[:, :0]),
         lambda: torch_npu.npu_fusion_attention(q, q, q, 0, "BNSD")),
        ("The input_layout should be BSH/SBH/BNSD/BSND/TND", ("the layout is not the caller's choice",),
         lambda: torch_npu.npu_fusion_attention(q, q, q, 4, "NBSD")),
    ]  # fmt: skip
    for message, ours, call in cases:
        assert ours and all("\n" not in reason for reason in ours), f"{message}: we let it through"
        try:
            call()
        except RuntimeError as error:
            assert message in str(error), f"{message}: {error}"
        else:
            raise AssertionError(f"torch_npu does not say {message!r} any more")
    # what only CANN would refuse, inside the kernel: ours are the only words about it
    with torch.no_grad():
        for ours in (
            fused_npu.mc2_limits(x, w.half(), ranks=2, scatter=True),
            fused_npu.mc2_limits(fresh((32, 64)), fresh((64, 64)), ranks=2, scatter=False),
            fused_npu.rms_norm_limits(fresh((4, 8)), fresh((4,))),
            fused_npu.swiglu_limits(fresh((4, 7))),
            fused_npu.rotary_limits(fresh((4, 2, 2, 8)), fresh((4, 1, 1, 6)), interleaved=False),
            fused_npu.rotary_limits(fresh((4, 2, 2, 7)), fresh((4, 1, 1, 7)), interleaved=False),
            fused_npu.rotary_limits(fresh((2, 40, 30, 8)), fresh((2, 1, 1, 8)), interleaved=True),
        ):
            assert len(ours) == 1, ours


def step() -> None:
    """Operators of one layer's forward and backward with LoRA in bf16, of the plain path and of the fused one."""
    from modellink_lora.adapters.fused import Fusion
    from modellink_lora.config.adapter import LoraConfig
    from modellink_lora.config.parallel import ParallelConfig
    from modellink_lora.parallel.context import make_context, start_processes
    from modellink_lora.training.base import open_base
    from modellink_lora.training.setup import set_up

    device = get_device("npu")
    here = device.activate(0)
    device.plain.clear()  # the check at the start compares values
    meeting = tempfile.mkdtemp()  # process groups are made as long as the process lives
    start_processes("hccl", rank=0, world_size=1, init_method=f"file://{meeting}/store", timeout_minutes=1)
    context = make_context(ParallelConfig(), here)
    base = open_base(
        None,
        {"num_layers": 1, "hidden_size": 256, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 512,
         "vocab_size": 128, "max_position_embeddings": 64, "swiglu": True, "normalization": "RMSNorm",
         "position_embedding_type": "rope", "untie_embeddings_and_output_weights": True},
        tp=1, seed=1, use_mcore_models=None,
    )  # fmt: skip
    lora = LoraConfig(r=4, alpha=8.0, target_modules=("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"))
    for fusion in (None, Fusion(device, level="auto", chunks=lambda base: lambda rows: 1, recompute_inputs=False)):
        setup = set_up(base, lora, None, context, device, dtype="bf16", seed=1, overrides={}, fusion=fusion)
        model = setup.chunks[0].train()
        ids = torch.zeros(2, 32, dtype=torch.int64, device=here)
        model(ids, ids, None, labels=ids).sum().backward()  # what is made once
        title = "fused" if fusion else "plain"
        with traced(f"{title} forward"):
            loss = model(ids, ids, None, labels=ids).sum()
        with traced(f"{title} backward"):
            loss.backward()


def joined() -> None:
    """Operators of the two products joined with a collective."""
    alone(ranks=2)
    x, weight = fresh((32, 512)), fresh((64, 512))
    with torch.no_grad(), traced("joined products"):
        fused_npu.gather_matmul(x, weight, PAIR)
        fused_npu.matmul_scatter(x, weight, PAIR)


@contextlib.contextmanager
def traced(title: str) -> Iterator[None]:
    """Print how often the block launches each operator, and copies to the host, in the order of the alphabet."""
    library = ctypes.CDLL("libascendcl.so")
    library.npu_sim_trace_stop.restype = ctypes.c_char_p
    library.npu_sim_trace_start()
    yield
    counts = Counter(library.npu_sim_trace_stop().decode().splitlines())
    print(f"# {title}")
    for name, count in sorted(counts.items()):
        print(f"{count:4} {name}")


if __name__ == "__main__":
    torch.npu.set_device(0)
    for program in sys.argv[1:]:
        try:
            globals()[program]()
        except Exception:  # the next program is another test's
            print(f"failed {program}: {traceback.format_exc()}", flush=True)
        else:
            print(f"done {program}", flush=True)
