"""Makes torch_npu's device "npu" compute, in host memory: replaces its kernels, keeps its front end.

With the simulated CANN of `cann/`, "device memory" is host memory. Each `aten` kernel that torch_npu registers is
replaced by one that looks at that memory as CPU tensors and runs the CPU kernel of the same operator. torch_npu keeps
everything above a kernel: tensors, storages, views, autograd, streams, generators, autocast, ProcessGroupHCCL.

`install()` must be called in a process that has imported torch_npu, before the device is used.
"""

from __future__ import annotations

import collections
import ctypes
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

calls: collections.Counter[str] = collections.Counter()  # operator -> how often its simulated kernel ran

_libraries: list[torch.library.Library] = []  # a registration lives as long as its Library

# These make or re-describe tensors without computing; torch_npu's own kernels do that right in host memory.
_KEPT = (
    "empty", "set_", "resize_", "_resize", "is_set_to", "record_stream", "is_pinned", "_pin_memory", "_lazy", "npu_",
    "as_strided", "view", "_reshape_alias", "unfold", "alias", "detach", "t.", "_conj", "_neg_view", "to.", "_to_copy",
    "contiguous",
)  # fmt: skip
# Random operators without a `generator` argument are known by name only.
_RANDOM = ("dropout", "rand", "normal", "bernoulli", "multinomial")
_OFFSET_STEP = 4  # a random operator takes at least one block of Philox's four numbers


def install() -> None:
    """Replace the kernels of torch_npu in this process."""
    from tests.npu_sim import fused_collectives, fused_ops

    aten = torch.library.Library("aten", "IMPL")
    for name in torch._C._dispatch_get_all_op_names():
        operator = _replaceable(name)
        if operator is not None:
            aten.impl(name.removeprefix("aten::"), _kernel(operator, name), "PrivateUse1", allow_override=True)
    for name, function in {"copy_": _copy, "matmul_backward": _matmul_backward, "one_": _one}.items():
        aten.impl(name, function, "PrivateUse1", allow_override=True)
    for key in ("PrivateUse1", "AutogradPrivateUse1"):
        aten.impl("scaled_dot_product_attention", _attention, key, allow_override=True)
    npu = torch.library.Library("npu", "IMPL")
    for name, function in fused_ops.KERNELS.items():
        npu.impl(name, _on_host(f"npu::{name}", function), "PrivateUse1", allow_override=True)
    for name, function in fused_collectives.KERNELS.items():
        npu.impl(name, _counted(f"npu::{name}", function), "PrivateUse1", allow_override=True)
    _libraries.extend([aten, npu])


# ---- memory


def on_npu(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == "npu"


def host_view(tensor: Tensor) -> Tensor:
    """The same memory as a CPU tensor. It does not keep the memory alive: use it within one kernel only."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    buffer = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    whole = torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=tensor.dtype).set_(whole, tensor.storage_offset(), tensor.size(), tensor.stride())


def device_copy(result: Tensor, device: torch.device) -> Tensor:
    """A CPU result, moved into new device memory."""
    copy = torch.empty_strided(result.size(), result.stride(), dtype=result.dtype, device=device)
    if result.numel():
        host_view(copy).copy_(result)
    return copy


def _host(value: Any) -> Any:
    if on_npu(value):
        return host_view(value)
    if isinstance(value, torch.device) and value.type == "npu":
        return torch.device("cpu")
    return value


def _device_of(values: list[Any]) -> torch.device:
    found = next((value.device for value in values if on_npu(value)), None)
    return found or torch.device("npu", torch.npu.current_device())


# ---- random numbers


def draw_seed(generator: torch.Generator | None = None) -> tuple[int, int]:
    """(seed, offset) of the device's generator, whose offset then advances; both are its whole state.

    So saving and restoring that state repeats the same numbers, which recomputation and megatron's tracker rely on.
    """
    generator = generator or torch.npu.default_generators[torch.npu.current_device()]
    state = bytes(generator.get_state().tolist())  # 8 bytes each, little endian
    seed, offset = int.from_bytes(state[:8], "little"), int.from_bytes(state[8:16], "little")
    advanced = state[:8] + (offset + _OFFSET_STEP).to_bytes(8, "little") + state[16:]
    generator.set_state(torch.tensor(list(advanced), dtype=torch.uint8))
    return seed, offset


def host_generator(seed: int, offset: int) -> torch.Generator:
    """A CPU generator that is a function of the device generator's state."""
    return torch.Generator().manual_seed((seed * 1_000_003 + offset) % 2**63)


# ---- kernels


def _replaceable(name: str) -> Any:
    """The operator `name` if torch_npu has a kernel for it that computes something the CPU can compute too."""
    if not name.startswith("aten::") or not torch._C._dispatch_has_kernel_for_dispatch_key(name, "PrivateUse1"):
        return None
    base, _, overload = name.removeprefix("aten::").partition(".")
    if f"{base}.{overload}".startswith(_KEPT) or not _runs_on_cpu(name):
        return None
    operator = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
    if operator is None or any(_is_view(result) for result in operator._schema.returns):
        return None
    return operator


def _runs_on_cpu(name: str) -> bool:
    keys = ("CPU", "CompositeExplicitAutograd", "CompositeImplicitAutograd", "CompositeExplicitAutogradNonFunctional")
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in keys)


def _is_view(result: Any) -> bool:
    return result.alias_info is not None and not result.alias_info.is_write


def _kernel(operator: Any, name: str) -> Callable[..., Any]:
    """A kernel for device tensors that runs `operator` on the CPU."""
    arguments = operator._schema.arguments
    written = [i for i, argument in enumerate(arguments) if argument.alias_info and argument.alias_info.is_write]
    takes_generator = any(argument.name == "generator" for argument in arguments)
    is_random = not takes_generator and any(word in name for word in _RANDOM)

    def run(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        device = kwargs.get("device") or _device_of(tree_leaves((args, kwargs)))
        if takes_generator:
            kwargs["generator"] = host_generator(*draw_seed(kwargs.get("generator")))
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        # lists of outputs (foreach, fused optimizers) need nothing: their elements are written where they lie
        outputs = [args[i] if i < len(args) else kwargs.get(arguments[i].name) for i in written]
        tensors: list[Tensor] = [value for value in outputs if on_npu(value)]
        views = {id(value): host_view(value) for value in tensors}
        before = {key: _place(view) for key, view in views.items()}

        def to_host(value: Any) -> Any:
            return views[id(value)] if id(value) in views else _host(value)

        host_args, host_kwargs = tree_map(to_host, (args, kwargs))
        if is_random:
            result = _with_device_seed(operator, host_args, host_kwargs)
        else:
            result = operator(*host_args, **host_kwargs)
        for output in tensors:
            view = views[id(output)]
            if _place(view) != before[id(output)]:  # an out= argument that the operator resized
                host_view(output.resize_(view.size())).copy_(view)
        given = {id(views[id(value)]): value for value in tensors}

        def to_device(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return given[id(value)] if id(value) in given else device_copy(value, torch.device(device))

        return tree_map(to_device, result) if operator._schema.returns else None

    return run


def _place(view: Tensor) -> tuple[torch.Size, int]:
    return view.size(), view.untyped_storage().data_ptr()


def _with_device_seed(operator: Any, args: Any, kwargs: Any) -> Any:
    outside = torch.default_generator.get_state()
    torch.default_generator.set_state(host_generator(*draw_seed()).get_state())
    try:
        return operator(*args, **kwargs)
    finally:
        torch.default_generator.set_state(outside)


def _on_host(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel for device tensors from a function of CPU tensors that changes none of them."""

    def run(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        device = _device_of(tree_leaves((args, kwargs)))
        host_args, host_kwargs = tree_map(_host, (args, kwargs))
        result = function(*host_args, **host_kwargs)
        return tree_map(
            lambda value: device_copy(value.contiguous(), device) if torch.is_tensor(value) else value, result
        )

    return run


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel out of operators and collectives of the device itself."""

    def run(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return function(*args, **kwargs)

    return run


def _copy(into: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Between devices in either direction, or within one."""
    _host(into).copy_(_host(source))
    return into


def _one(tensor: Tensor) -> Tensor:
    """torch_npu's own in-place operator."""
    host_view(tensor).fill_(1)
    return tensor


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    """torch_npu calls its fused kernel past the dispatcher; here it is made of operators that we replace."""
    mask = args[3] if len(args) > 3 else kwargs.pop("attn_mask", None)
    if mask is not None and mask.dtype == torch.bool:  # True is seen; what it is made of adds the mask to the scores
        mask = torch.zeros_like(mask, dtype=args[0].dtype).masked_fill(~mask, float("-inf"))
    return torch.ops.aten._scaled_dot_product_attention_math(*args[:3], mask, *args[4:], **kwargs)[0]


def _matmul_backward(grad: Tensor, left: Tensor, right: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    """torch_npu differentiates matmul as a whole; the CPU has no operator for that. Dimensions above two broadcast."""
    g, a, b = host_view(grad), host_view(left), host_view(right)
    if a.dim() < 2 or b.dim() < 2:
        raise NotImplementedError("npu_sim: the derivative of matmul with a vector is not simulated")
    empty = torch.empty(0, dtype=g.dtype)
    for_left = (g @ b.mT).sum_to_size(a.shape) if wanted[0] else empty
    if not wanted[1]:
        for_right = empty
    elif b.dim() == 2:  # as one product over all leading dimensions: one rounding, not a sum of rounded products
        rows = math.prod(a.shape[:-1])
        for_right = a.reshape(rows, a.shape[-1]).mT @ g.reshape(rows, g.shape[-1])
    else:
        for_right = (a.mT @ g).sum_to_size(b.shape)
    return device_copy(for_left.contiguous(), grad.device), device_copy(for_right.contiguous(), grad.device)
