"""The processes of one model at work: the leader decides, all compute. What is sent is tokens in and logits out.

The leader is the first process of its replica (tensor rank 0 of the first stage). It calls the methods below; every
other process of the replica sits in `follow` and does the same, because the leader tells it before it begins.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from modellink_lora.checkpoint.dtypes import dtype_name
from modellink_lora.inference.cache import KeyValueCache, Places, cache_bytes
from modellink_lora.inference.request import Choice
from modellink_lora.inference.stage import Stage
from modellink_lora.parallel.context import ParallelContext

_FOR_EVER = datetime.timedelta(days=3650)  # how long the others wait for the leader's word; it may wait for a person
_LOGITS_AT_ONCE = 32 * 2**20  # numbers; more positions are scored in pieces


@dataclass(frozen=True)
class Batch:
    """New tokens of some rows of the cache.

    Args:
        tokens: of each row, from its slot in `starts` on.
        wanted: (row of the batch, index of its new token) after which the next token's logits are asked for.
        targets: instead of whole logits, the log-probabilities of one token each of `wanted`.
    """

    choice: Choice
    rows: Sequence[int]
    starts: Sequence[int]
    tokens: Sequence[Sequence[int]]
    wanted: Sequence[tuple[int, int]]
    targets: Sequence[int] | None = None


class Executor:
    """One stage of the replica, its cache, and the way to the other stages."""

    def __init__(self, stage: Stage, context: ParallelContext, *, say: Callable[[str], None]) -> None:
        self.stage, self.context, self._say = stage, context, say
        self.cache: KeyValueCache | None = None
        self._control = _control_group(context)

    @property
    def vocab_size(self) -> int:
        return self.stage.config.vocab_size

    @property
    def dtype(self) -> str:
        """In which it computes: fp32, bf16 or fp16."""
        return dtype_name(self.stage.dtype, where="the model")

    # What the leader calls.

    def forward(self, batch: Batch) -> Tensor:
        """fp32 on the CPU: logits [n, v] after each of `wanted`; with targets [n, 2], log-probability and whether the
        target is the most likely token. A row of logits that are not all finite is NaN (see Stage.logits)."""
        self._tell("_forward", batch)
        result = self._forward(batch)
        if self.context.pp_size == 1 or not batch.wanted:
            return torch.empty(0) if result is None else result
        width = 2 if batch.targets is not None else self.vocab_size
        received = torch.empty(len(batch.wanted), width, device=self.context.device)
        dist.recv(received, src=self._peer(-1), group=self.context.pp_group)
        return received.cpu()

    def reserve(self, rows: int, slots: int) -> None:
        """Make the cache at least that large; what is in it stays."""
        if self.cache is None or rows > self.cache.rows or slots > self.cache.slots:
            if self.cache is not None:
                rows, slots = max(rows, self.cache.rows), max(slots, self.cache.slots)
            prompts = "1 prompt" if rows == 1 else f"{rows} prompts"
            self._say(f"key/value cache: {prompts} x {slots} tokens, {_size(self.cache_bytes(rows, slots))} on each "
                      "process of the fullest stage")  # fmt: skip
            self._tell("_reserve", rows, slots)
            self._reserve(rows, slots)

    def copy(self, source: Sequence[int], target: Sequence[int], length: int) -> None:
        """Let rows `target` of the cache begin like rows `source`."""
        self._tell("_copy", source, target, length)
        self._copy(source, target, length)

    def clear(self, rows: Sequence[int]) -> None:
        """Zero `rows` of the cache. NaN left in one would reach its next prompt: a weight of 0 x NaN is NaN."""
        self._tell("_clear", rows)
        self._clear(rows)

    def dismiss(self) -> None:
        """Let the other processes leave `follow`."""
        self._tell("")
        self._leave()

    def cache_bytes(self, rows: int, slots: int) -> int:
        """Bytes that a cache takes on a process of the stage with the most layers."""
        config, context = self.stage.config, self.context
        layers = -(-config.num_layers // context.pp_size)
        return cache_bytes(config, layers, context.tp_size, rows, slots, self.stage.dtype.itemsize)

    # What the others do.

    def follow(self) -> None:
        """Do what the leader does until it is done."""
        assert self._control is not None
        while True:
            word: list[Any] = [None]
            dist.broadcast_object_list(word, src=dist.get_global_rank(self._control, 0), group=self._control)
            name, arguments = word[0]
            if not name:
                return self._leave()
            getattr(self, name)(*arguments)

    def _leave(self) -> None:
        if self._control is not None:
            dist.destroy_process_group(self._control)

    def _tell(self, name: str, *arguments: Any) -> None:
        if self._control is not None:
            dist.broadcast_object_list([(name, arguments)], src=self.context.rank, group=self._control)

    # What all do.

    def _reserve(self, rows: int, slots: int) -> None:
        self.cache = self.cache.grown(rows, slots) if self.cache else self.stage.new_cache(rows, slots)

    def _copy(self, source: Sequence[int], target: Sequence[int], length: int) -> None:
        assert self.cache is not None
        with torch.inference_mode():
            self.cache.copy(source, target, length)

    def _clear(self, rows: Sequence[int]) -> None:
        assert self.cache is not None
        with torch.inference_mode():
            self.cache.store[:, :, list(rows)] = 0

    def _forward(self, batch: Batch) -> Tensor | None:
        """The result on the last stage, None elsewhere."""
        stage, context, cache = self.stage, self.context, self.cache
        assert cache is not None
        lengths = [len(row) for row in batch.tokens]
        width = max(lengths)
        with torch.inference_mode():
            places = Places.of(batch.rows, batch.starts, lengths, cache.slots, context.device)
            stage.choose(batch.choice)
            if context.is_first_stage:
                tokens = [[*row, *[0] * (width - len(row))] for row in batch.tokens]
                hidden = stage.embed(torch.tensor(tokens, device=context.device), places)
            else:
                hidden = torch.empty(
                    len(lengths) * width, stage.config.hidden_size, dtype=stage.dtype, device=context.device
                )
                dist.recv(hidden, src=self._peer(context.pp_rank - 1), group=context.pp_group)
            hidden = stage.run(hidden, cache, places)
            if not context.is_last_stage:
                dist.send(hidden, dst=self._peer(context.pp_rank + 1), group=context.pp_group)
                return None
            if not batch.wanted:
                return None
            after = torch.tensor([row * width + at for row, at in batch.wanted], device=context.device)
            result = self._outputs(hidden[after], batch.targets)
            if context.pp_size > 1 and context.tp_rank == 0:
                dist.send(result, dst=self._peer(0), group=context.pp_group)
            return result.cpu()

    def _outputs(self, hidden: Tensor, targets: Sequence[int] | None) -> Tensor:
        if targets is None:
            return self.stage.logits(hidden)
        step = max(1, _LOGITS_AT_ONCE // self.vocab_size)
        wanted = torch.tensor(targets, device=hidden.device)
        pieces = []
        for start in range(0, len(hidden), step):
            logits, target = self.stage.logits(hidden[start : start + step]), wanted[start : start + step, None]
            chosen = logits.gather(1, target)
            best = (logits.argmax(1, keepdim=True) == target).float()
            pieces.append(torch.cat((chosen - logits.logsumexp(1, keepdim=True), best), 1))
        return torch.cat(pieces)

    def _peer(self, stage: int) -> int:
        return dist.get_process_group_ranks(self.context.pp_group)[stage]


def _control_group(context: ParallelContext) -> ProcessGroup | None:
    """The processes of this replica, over the CPU; None where there is only one."""
    size = context.tp_size * context.pp_size
    if size == 1:
        return None
    everyone: list[Any] = [None] * context.world_size
    dist.all_gather_object(everyone, context.dp_rank)
    mine = None
    for replica in range(context.dp_size):
        ranks = [rank for rank, number in enumerate(everyone) if number == replica]
        group = dist.new_group(ranks, backend="gloo", timeout=_FOR_EVER)
        if replica == context.dp_rank:
            mine = group
    return mine


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
