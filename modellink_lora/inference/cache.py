"""The static key/value cache: a row for each prompt, a slot for each position, and what there is in it.

Letters: r rows, l slots, b rows of a batch, s new tokens of each, g query groups of this rank, d head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modellink_lora.config.model import ModelConfig


@dataclass(frozen=True)
class Places:
    """Where the new tokens of a batch stand. Row i of the batch is row `rows[i]` of the cache, from slot `starts[i]`.

    A slot is a position: every row begins at slot 0, whatever its length, and padding goes to a slot behind the last
    that nobody looks at. So rows of any lengths share a batch and each sees its own tokens only.
    """

    rows: Tensor  # [b]
    first_row: int | None  # where the rows follow one another: the first of them
    positions: Tensor  # [b, s]
    start: int | None  # where all rows start at the same slot and have the same length: that slot
    longest: int  # slots that any row looks at

    @classmethod
    def of(cls, rows: Sequence[int], starts: Sequence[int], lengths: Sequence[int], trash: int, device: torch.device
           ) -> Places:  # fmt: skip
        """`lengths` new tokens in each row; `trash` is the slot of the padding."""
        width = max(lengths)
        steps = torch.arange(width, device=device)
        begin, new = torch.tensor(starts, device=device), torch.tensor(lengths, device=device)
        positions = torch.where(steps < new[:, None], begin[:, None] + steps, trash)
        following = list(rows) == list(range(rows[0], rows[0] + len(rows)))
        same = len(set(starts)) == 1 and len(set(lengths)) == 1
        return cls(
            rows=torch.tensor(rows, device=device), first_row=rows[0] if following else None, positions=positions,
            start=starts[0] if same else None,
            longest=max(start + length for start, length in zip(starts, lengths, strict=True)),
        )  # fmt: skip


class KeyValueCache:
    """Keys and values of this rank's layers, each [r, g, l + 1, d]; the last slot takes the padding."""

    def __init__(self, layers: int, rows: int, slots: int, groups: int, channels: int, dtype: torch.dtype,
                 device: torch.device) -> None:  # fmt: skip
        self.rows, self.slots = rows, slots
        shape = (layers, 2, rows, groups, slots + 1, channels)
        # zeros, not what lay in memory: a slot nobody has written is multiplied by a weight of 0, and 0 * nan is nan
        self.store = torch.zeros(shape, dtype=dtype, device=device)
        self.layers = [(self.store[i, 0], self.store[i, 1]) for i in range(layers)]

    def extend(self, layer: int, k: Tensor, v: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """Store k and v [b, s, g, d] of new tokens; returns keys and values [b, g, l, d] of all tokens so far."""
        keys, values = self.layers[layer]
        b, s = k.shape[:2]
        if places.first_row is not None and places.start is not None:
            row, start = slice(places.first_row, places.first_row + b), slice(places.start, places.start + s)
            keys[row, :, start] = k.transpose(1, 2)
            values[row, :, start] = v.transpose(1, 2)
        else:
            keys[places.rows[:, None], :, places.positions] = k
            values[places.rows[:, None], :, places.positions] = v
        if places.first_row is not None:
            row = slice(places.first_row, places.first_row + b)
            return keys[row, :, : places.longest], values[row, :, : places.longest]
        return keys[places.rows, :, : places.longest], values[places.rows, :, : places.longest]

    def copy(self, source: Sequence[int], target: Sequence[int], length: int) -> None:
        """Let rows `target` hold the first `length` slots of rows `source`, as those are now."""
        rows = torch.tensor(source, device=self.store.device)
        taken = self.store[:, :, rows, :, :length]
        self.store[:, :, torch.tensor(target, device=self.store.device), :, :length] = taken

    def grown(self, rows: int, slots: int) -> KeyValueCache:
        """A cache of another size with what fits of this one."""
        layers, _, _, groups, _, channels = self.store.shape
        new = KeyValueCache(layers, rows, slots, groups, channels, self.store.dtype, self.store.device)
        r, kept = min(rows, self.rows), min(slots, self.slots)
        new.store[:, :, :r, :, :kept] = self.store[:, :, :r, :, :kept]
        return new


def cache_bytes(config: ModelConfig, layers: int, tp: int, rows: int, slots: int, itemsize: int) -> int:
    """Bytes of the cache on one process that holds `layers` layers."""
    return 2 * layers * rows * (config.num_query_groups // tp) * (slots + 1) * config.kv_channels * itemsize
