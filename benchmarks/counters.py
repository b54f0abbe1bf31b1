"""Counts of what a piece of PyTorch code does: kernels, collectives with their bytes, and bytes saved for backward.

On every back end `torch.distributed` reaches its collectives through operators of the namespace c10d, so one dispatch
mode sees them beside ATen's own operators, in forward and in backward. Time is not measured here.
"""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork, ProcessGroup, Work, _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# Operators that move no element: besides these, whatever the schema declares a view (view, t, slice, detach, ...).
METADATA = frozenset({
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "_reshape_alias",
    "lift_fresh", "resize_", "set_", "is_same_size",
})  # fmt: skip
COMMUNICATION = frozenset({"c10d", "_c10d_functional", "symm_mem"})  # namespaces
KINDS = {
    "_allgather_base_": "all_gather", "allgather_": "all_gather", "allgather_coalesced_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather", "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter", "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter", "reduce_scatter_tensor": "reduce_scatter",
    "allreduce_": "all_reduce", "allreduce_coalesced_": "all_reduce", "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce", "broadcast_": "broadcast", "alltoall_base_": "all_to_all", "alltoall_": "all_to_all",
    "fused_all_gather_matmul": "all_gather", "fused_matmul_reduce_scatter": "reduce_scatter",
}  # fmt: skip
WAITS = frozenset({"wait_tensor"})  # of functional collectives: no collective of its own


@dataclass(frozen=True)
class Collective:
    """One call. `payload` is the bytes of the whole tensor, that is of all ranks' parts together."""

    kind: str
    payload: int
    ranks: int

    @property
    def wire(self) -> int:
        """Bytes that each rank sends in a ring."""
        passes = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}.get(self.kind)
        return self.payload if passes is None else passes * self.payload * (self.ranks - 1) // self.ranks


Watcher = TypeVar("Watcher", bound="Watching")


class Watching(TorchDispatchMode):
    """Tells a subclass of kernels and collectives, and of waits for collectives.

    What a back end does to finish a collective, such as gloo's copy of a sum into its place, is part of the collective.
    """

    def __init__(self) -> None:
        super().__init__()
        self._finishing = False
        # the handles of a group that does not exist have a `wait` of their own
        self._patches = [patch.object(kind, "wait", _told(self, kind.wait)) for kind in (Work, FakeWork)]

    def kernel(self, function: Any, args: Any, kwargs: Any, result: Any, seconds: float) -> None:
        """An operator on elements ran."""

    def launched(self, collective: Collective, work: Any, begin: float) -> None:
        """A collective was started at time `begin`; `work` is the object that its caller may wait for."""

    def waited(self, work: Any) -> None:
        """Somebody waited for a collective, and it is done."""

    def __enter__(self: Watcher) -> Watcher:
        for one in self._patches:
            one.start()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for one in self._patches:
            one.stop()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        begin = time.perf_counter()
        result = function(*args, **(kwargs or {}))
        if is_collective(function):
            self.launched(collective_of(function, args, result), work_of(result), begin)
        elif is_kernel(function) and not self._finishing:
            self.kernel(function, args, kwargs or {}, result, time.perf_counter() - begin)
        return result


def _told(watching: Watching, original: Callable[..., bool]) -> Callable[..., bool]:
    def wait(work: Any, *args: Any) -> bool:
        watching._finishing = True
        try:
            finished = original(work, *args)
        finally:
            watching._finishing = False
        watching.waited(work)
        return finished

    return wait


class Counts(Watching):
    """While it is on: `kernels`, calls by operator name, and `collectives` in order."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.collectives: list[Collective] = []

    def kernel(self, function: Any, args: Any, kwargs: Any, result: Any, seconds: float) -> None:
        self.kernels[name_of(function)] += 1

    def launched(self, collective: Collective, work: Any, begin: float) -> None:
        self.collectives.append(collective)

    @property
    def calls(self) -> int:
        return self.kernels.total()

    @property
    def by_kind(self) -> dict[str, int]:
        return dict(Counter(call.kind for call in self.collectives))

    @property
    def payload(self) -> int:
        return sum(call.payload for call in self.collectives)

    @property
    def wire(self) -> int:
        return sum(call.wire for call in self.collectives)


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that autograd keeps for backward, over unique storages: read `bytes` while the graph is alive.

    A view keeps its whole storage alive, so the whole storage counts. Tensors that a function keeps as plain
    attributes instead of saving them are not seen.
    """

    def __init__(self) -> None:
        self._kept: weakref.WeakSet[_Kept] = weakref.WeakSet()
        super().__init__(self._pack, lambda kept: kept.tensor)

    def __enter__(self) -> Saved:  # type: ignore[override]
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        self._kept.add(kept)
        return kept

    def storages(self, *, without: Iterable[Tensor] = ()) -> dict[int, int]:
        """Storage: its bytes, except those that tensors of `without` live in (parameters are there anyway)."""
        found = {_storage(kept.tensor): kept.tensor.untyped_storage().nbytes() for kept in self._kept}
        for tensor in without:
            found.pop(_storage(tensor), None)
        return found

    def bytes(self, *, without: Iterable[Tensor] = ()) -> int:
        return sum(self.storages(without=without).values())


class _Kept:
    """A saved tensor; the graph's node owns it, so that it goes when the node does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def name_of(function: Any) -> str:
    """aten.addmm.out -> addmm; operators of other namespaces keep theirs."""
    namespace, name = function._schema.name.split("::")
    return name if namespace in COMMUNICATION | {"aten"} else f"{namespace}.{name}"


def is_kernel(function: Any) -> bool:
    """Whether the operator works on elements, as views and allocations do not."""
    skip = function.namespace in COMMUNICATION | {"prim"} or function.is_view
    return not skip and name_of(function) not in METADATA and not name_of(function).startswith("sym_")


def is_collective(function: Any) -> bool:
    return function.namespace in COMMUNICATION and name_of(function) not in WAITS


def collective_of(function: Any, args: Any, result: Any) -> Collective:
    """What a call did; kinds that KINDS does not know keep their operator's name."""
    payload = max(nbytes(part) for part in (*args[:2], result))
    return Collective(KINDS.get(name_of(function), name_of(function)), payload, ranks_of(args))


def ranks_of(args: Any) -> int:
    """Size of the process group among the arguments; functional collectives name theirs."""
    for value in args:
        if isinstance(value, torch.ScriptObject) and value._type().name() == "ProcessGroup":
            return int(ProcessGroup.unbox(value).size())
    names = [value for value in args if isinstance(value, str)]
    return int(_resolve_process_group(names[-1]).size()) if names else 1


def work_of(result: Any) -> Any:
    """The handle among a collective's results, the very object that torch.distributed gives its caller."""
    for value in result if isinstance(result, tuple | list) else (result,):
        if isinstance(value, torch.ScriptObject):
            return Work.unbox(value)
    return None


def tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


def nbytes(tree: Any) -> int:
    """Bytes of all elements of all tensors in it; elements that an expanded dimension repeats count once."""
    return sum(_elements(tensor) * tensor.element_size() for tensor in tensors(tree))


def _elements(tensor: Tensor) -> int:
    total = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        total *= 1 if stride == 0 and size > 1 else size
    return total
