"""A CPU that records and replays like a CUDA graph: operators on fixed addresses, none of the Python around them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modellink_lora.device.cpu import CpuDevice
from modellink_lora.device.hashing import mix, threshold

# They give numbers to Python, for which the host would have to wait: no stream may be waited for in a recording.
FOR_THE_HOST = ("_local_scalar_dense", "nonzero", "equal")
MEMORY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")  # no kernel


class Recorder(TorchDispatchMode):
    """Notes every operator that runs inside it, in forward and backward, with its own tensors."""

    def __init__(self, forbids: str | None) -> None:
        super().__init__()
        self.forbids = forbids
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._made: set[int] = set()  # storages
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._opname
        if name in (*FOR_THE_HOST, self.forbids):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}\nmore lines follow")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in _tensors(value):
                    self._keep(tensor)
        result = _run(func, args, kwargs)
        given = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        self._made |= {_storage(tensor) for tensor in _tensors(result)} - given
        self.calls.append((func, args, kwargs, result))
        return result

    def _keep(self, tensor: torch.Tensor) -> None:
        """What a tensor from outside holds before it is written to: a recording runs nothing."""
        key = _storage(tensor)
        if key not in self._made and key not in self._before:
            whole = tensor.detach().new_empty(0).set_(tensor.untyped_storage())
            self._before[key] = (whole, whole.clone())

    def undo(self) -> None:
        with torch.no_grad():
            for tensor, before in self._before.values():
                tensor.copy_(before)
            for *_, result in self.calls:
                for tensor in _tensors(result):
                    if _storage(tensor) in self._made and tensor.is_floating_point():
                        tensor.fill_(float("nan"))

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, result in self.calls:
                if func._opname in MEMORY or _is_view(func):
                    continue
                again = _run(func, args, kwargs)
                for old, new in zip(_tensors(result), _tensors(again), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.detach().copy_(new)


def _dropped(rows: torch.Tensor, columns: torch.Tensor, probability: float) -> torch.Tensor:
    return mix(rows ^ mix(columns)) < threshold(probability)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """A collective is waited for in here. gloo's reduce-scatter would copy its result out in every `wait` of a caller,
    by operators of its own: it is made of an all-reduce instead."""
    if func._opname == "_reduce_scatter_base_":
        output, given, group, *rest = args
        summed = given.clone()
        _, work = torch.ops.c10d.allreduce_([summed], group, rest[0], None, timeout=-1)
        work.wait()
        unboxed = dist.ProcessGroup.unbox(group)
        output.copy_(summed.chunk(unboxed.size())[unboxed.rank()])
        return output, work
    result = func(*args, **kwargs)
    for leaf in tree_leaves(result):
        if hasattr(leaf, "wait"):
            leaf.wait()
    return result


def _is_view(func: Any) -> bool:
    """Whether it only gives a tensor another form: no kernel either."""
    infos = [returned.alias_info for returned in func._schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class RecordingCpu(CpuDevice):
    """A CPU with `record`.

    Args:
        forgets: the operator whose kernel is missing from every replay.
        forbids: the operator that a recording does not take.
        numpy_masks: leave numpy, which no recording sees, to make the masks of dropout, as it does on a CPU.
    """

    records_graphs = True

    def __init__(
        self, *, forgets: str | None = None, forbids: str | None = None, numpy_masks: bool = False
    ) -> None:  # fmt: skip
        self.forgets, self.forbids, self.numpy_masks = forgets, forbids, numpy_masks
        self.recordings = self.replays = 0

    @contextlib.contextmanager
    def _masks_by_operators(self) -> Iterator[None]:
        """Masks as devices make them; the bits are the same."""
        from modellink_lora.device import lora_ops
        from modellink_lora.models import dropout

        kept = dropout.dropped
        if not self.numpy_masks:
            dropout.dropped = lora_ops.dropped = _dropped  # type: ignore[attr-defined]
        try:
            yield
        finally:
            dropout.dropped = lora_ops.dropped = kept  # type: ignore[attr-defined]

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        recorder = Recorder(self.forbids)
        self.recordings += 1
        with recorder, self._masks_by_operators():
            result = work()
        recorder.undo()
        calls = [call for call in recorder.calls if call[0]._opname != self.forgets]
        assert self.forgets is None or len(calls) < len(recorder.calls), f"{self.forgets} was never called"
        recorder.calls = calls

        def replay() -> None:
            self.replays += 1
            recorder.replay()

        return replay, result


def fine_tune_recorded(*, broken: dict[str, Any], **arguments: Any) -> tuple[str, int, int]:
    """`fine_tune_here` on a RecordingCpu(**broken): what it says to the user when it stops, recordings, replays."""
    from tests.helpers.training import error_of

    device = RecordingCpu(**broken)
    said = error_of(**arguments, device=device)
    return said, device.recordings, device.replays
