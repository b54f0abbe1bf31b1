"""Bytes of live tensor storages, followed by weak reference: what a rank really holds, not what its process maps.

A dispatch mode sees the tensors that operators return, inside autograd's backward too, so parameters, gradient
buffers, optimizer state and saved activations are all counted, each storage once however many views it has. Buffers
that a single kernel takes and gives back before it returns are no tensors and stay unseen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Allocations(TorchDispatchMode):
    """`live` and `peak` bytes of the storages that came into being while the mode was on, or were given to `watch`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._events: list[tuple[int, int, str]] = []  # (storage, change in bytes, the operator that made it)
        self._peak_event = 0
        self._resize: Any = None

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were made before."""
        for tensor in tensors:
            self._see(tensor, "watched")

    def reset_peak(self) -> None:
        self.peak, self._peak_event = self.live, len(self._events)

    def at_peak(self) -> Counter[str]:
        """Bytes by operator and shape of what was alive at the peak: for finding what an estimate forgot."""
        alive: dict[int, tuple[int, str]] = {}
        for key, change, label in self._events[: self._peak_event]:
            size = alive.pop(key, (0, ""))[0] + change
            if size:
                alive[key] = (size, label)
        total: Counter[str] = Counter()
        for size, label in alive.values():
            total[label] += size
        return total

    def __enter__(self) -> Allocations:
        original = self._resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            original(storage, size)
            if id(storage) in self._sizes:
                self._change(id(storage), storage.nbytes(), "resized")
            return storage

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign,assignment]  # no operator: dispatch is blind
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._see(tensor, str(function))
        return result

    def _see(self, tensor: Tensor, label: str) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._sizes:
            return
        self._references[key] = weakref.ref(storage, lambda _, key=key: self._forget(key))
        self._sizes[key] = 0
        self._change(key, storage.nbytes(), f"{label} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}")

    def _forget(self, key: int) -> None:
        self._change(key, 0, "freed")
        del self._sizes[key], self._references[key]

    def _change(self, key: int, size: int, label: str) -> None:
        change = size - self._sizes[key]
        self._sizes[key] = size
        self.live += change
        self._events.append((key, change, label))
        if self.live > self.peak:
            self.peak, self._peak_event = self.live, len(self._events)
