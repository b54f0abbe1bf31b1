"""What stops a run that would go wrong in silence. Every guard says what it saw, why that matters and what to do."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from modellink_lora.adapters.lora import LoraLinear
from modellink_lora.adapters.targets import AdaptedLinear
from modellink_lora.checkpoint.names import from_module
from modellink_lora.config.errors import UserError
from modellink_lora.models.build import GPT
from modellink_lora.models.layouts import Layout, Replicated
from modellink_lora.parallel.context import ParallelContext
from modellink_lora.parallel.partition import Partition
from modellink_lora.training.step import Totals

FIRST_STEPS = 3  # with finite gradients, in which every adapter must have received one


class Guards:
    """The checks of a run. Every process calls every method at the same step.

    Args:
        layouts: how each tensor, of the base and of the adapters, lies over tensor ranks, by global name.
        check_finite: stop on a loss or gradient that is not a number.
        overflow_is_normal: fp16 finds its loss scale by overflowing: only the loss is checked then.
    """

    def __init__(
        self,
        chunks: Sequence[GPT],
        layers: Mapping[str, LoraLinear],
        linears: Sequence[AdaptedLinear],
        partition: Partition,
        context: ParallelContext,
        *,
        layouts: Mapping[str, Layout],
        check_finite: bool,
        overflow_is_normal: bool,
    ) -> None:
        self._chunks, self._layers, self._linears = chunks, layers, linears
        self._partition, self._context, self._layouts = partition, context, layouts
        self._check_finite, self._overflow_is_normal = check_finite, overflow_is_normal
        self._steps = 0
        self._gradients = torch.zeros(len(linears), device=context.device)  # largest seen, by adapter

    def before_update(self, iteration: int, totals: Totals, forward_again: Callable[[], None]) -> None:
        """Called with the gradients of a global batch in place and the weights still as they were."""
        if not totals.tokens:  # no update follows
            return
        if self._check_finite and not math.isfinite(totals.loss):
            where = self._first_not_finite(forward_again)
            raise UserError(
                f"iteration {iteration}: the loss is {totals.loss}; {where}. No weight was changed and nothing was "
                "saved. Look at the samples of this step, lower --lr, or use --bf16 instead of --fp16; "
                "--no-check-for-nan-in-loss-and-grad goes on regardless"
            )
        if self._check_finite and totals.alarm and not self._overflow_is_normal:
            raise UserError(
                f"iteration {iteration}: the loss is {totals.loss:g}, but {self._last_bad_gradient()}. No weight was "
                "changed and nothing was saved. Look at the samples of this step or lower --lr; "
                "--no-check-for-nan-in-loss-and-grad goes on regardless"
            )
        if self._steps < FIRST_STEPS and not totals.alarm:  # inf and nan come out of a gradient of 0 as well: 0 x inf
            self._steps += 1
            self._note_gradients()
            if self._steps == FIRST_STEPS:
                self._require_gradients()

    def at_end(self) -> None:
        """Runs shorter than the first steps are judged by the steps they had."""
        if 0 < self._steps < FIRST_STEPS:
            self._require_gradients()

    def weight_not_finite(self) -> str | None:
        """The name of a trained tensor that is not finite on some process; the same answer on all of them.

        An update can leave the range of the weights' dtype although loss and gradients were finite.
        """
        trained = ((name, p) for name, p in self._named_parameters() if p.requires_grad)
        found = next((name for name, parameter in trained if not parameter.isfinite().all()), None)
        differs = torch.tensor(int(found is not None), device=self._context.device)
        dist.all_reduce(differs)
        if not differs:
            return None
        everyone: list[str | None] = [None] * self._context.world_size
        dist.all_gather_object(everyone, found)
        return next(filter(None, everyone))

    def _note_gradients(self) -> None:
        found = torch.zeros_like(self._gradients)
        for number, linear in enumerate(self._linears):
            if layer := self._layers.get(linear.name):
                factors: tuple[Any, Any] = (layer.lora_A, layer.lora_B)  # megatron-core gave them a main_grad
                gradients = [parameter.main_grad for parameter in factors]
                found[number] = torch.stack([gradient.abs().max().float() for gradient in gradients]).max()
        self._gradients = torch.maximum(self._gradients, found)

    def _require_gradients(self) -> None:
        dist.all_reduce(self._gradients, op=dist.ReduceOp.MAX)
        silent = [x.name for x, seen in zip(self._linears, self._gradients.tolist(), strict=True) if seen == 0]
        if silent:
            steps = f"{self._steps} steps" + (" without overflow" if self._overflow_is_normal else "")
            raise UserError(
                f"{len(silent)} of {len(self._linears)} adapters received no gradient at all in the first "
                f"{steps} (first: {silent[0]}): the loss does not depend on them, and training would leave "
                "them as they are. With --fp16 gradients may underflow: raise --initial-loss-scale or use --bf16. "
                "Otherwise this is an error of the program: please report it with the command"
            )

    def check_replicas(self, iteration: int, *, frozen: bool = False) -> None:
        """Compare the bits of all tensors that several processes hold: over replicas, and over tensor ranks.

        Args:
            frozen: compare the base's tensors, not the adapters'.
        """
        context = self._context
        named = {name: p for name, p in self._named_parameters() if p.requires_grad != frozen}
        whole = {name: p for name, p in named.items() if type(self._layouts.get(name)) is Replicated}
        # both on every process, whatever the first finds: each is a collective of its group
        of_replicas = _difference(named, context.dp_group, "data-parallel replicas")
        of_tensor_ranks = _difference(whole, context.tp_group, "tensor-parallel ranks")
        found = of_replicas or of_tensor_ranks
        differs = torch.tensor(int(found is not None), device=context.device)
        dist.all_reduce(differs)  # what one group sees the others must learn: nobody goes on alone
        if differs:
            everyone: list[Any] = [None] * context.world_size
            dist.all_gather_object(everyone, found)
            raise UserError(
                f"iteration {iteration}: {next(filter(None, everyone))}. They hold one tensor and must agree bit by "
                "bit; from here on they would train different models. Resume from the last checkpoint; if it happens "
                "again at the same rank, suspect its device's memory"
            )

    def _named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(global name, tensor) of everything this process holds."""
        for number, chunk in enumerate(self._chunks):
            for name, parameter in chunk.named_parameters():
                yield self._global(name, number), parameter

    def _global(self, name: str, chunk: int) -> str:
        return from_module(self._partition.to_global(name, self._context.pp_rank, chunk).replace(".base_layer", ""))

    def _first_not_finite(self, forward_again: Callable[[], None]) -> str:
        """Run the step's forward pass once more and watch every module; the earliest finding of all processes."""
        found: list[tuple[int, int, str]] = []  # (run of layers, place within, what)
        handles = []
        for number, chunk in enumerate(self._chunks):
            run = number * self._context.pp_size + self._context.pp_rank
            for name, parameter in chunk.named_parameters():
                if not parameter.isfinite().all():
                    found.append((run, -1, f"the weight {self._global(name, number)} is not finite"))
            for name, module in chunk.named_modules():
                watch = functools.partial(_watch, found, run, self._global(name, number))
                handles.append(module.register_forward_hook(watch, with_kwargs=True))
        forward_again()
        for handle in handles:
            handle.remove()
        everyone: list[Any] = [None] * self._context.world_size
        dist.all_gather_object(everyone, min(found, default=None))
        first = min((finding for finding in everyone if finding), default=None)
        return first[2] if first else "every layer's output is finite, so it begins in the loss itself"

    def _last_bad_gradient(self) -> str:
        """Gradients spoil from the last layer backwards: the adapter's bad one nearest to the loss, if one is bad."""
        last = torch.tensor(-1, device=self._context.device)
        for number, linear in enumerate(self._linears):
            layer = self._layers.get(linear.name)
            factors: tuple[Any, ...] = (layer.lora_A, layer.lora_B) if layer else ()
            if not all(p.main_grad.isfinite().all() for p in factors):
                last.fill_(number)
        dist.all_reduce(last, op=dist.ReduceOp.MAX)
        if last < 0:
            return "a gradient is not finite, and it is none of the adapters': where it lies is not known"
        return f"a gradient is not finite, nearest to the loss at {self._linears[int(last)].name}"


def _difference(tensors: Mapping[str, Tensor], group: Any, what: str) -> str | None:
    """The first of `tensors` that the processes of `group` do not all hold alike, in words."""
    if dist.get_world_size(group) == 1 or not tensors:
        return None
    own = torch.stack([checksum(tensor) for tensor in tensors.values()])  # [n, 3]
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    for number, name in enumerate(tensors):
        sums = [tuple(other[number].tolist()) for other in everyone]
        common = max(set(sums), key=sums.count)
        odd = [r for r, found in zip(dist.get_process_group_ranks(group), sums, strict=True) if found != common]
        if odd:
            return f"{name} is not the same on all {what}: rank {', '.join(map(str, odd))} differs"
    return None


def _watch(found: list[tuple[int, int, str]], run: int, name: str, _: Any, args: Any, kwargs: Any, output: Any) -> None:
    """Forward hook. Inner modules end first, so the first finding is the innermost."""
    if _finite((*args, *kwargs.values())) and not _finite(output):
        found.append((run, len(found), f"it begins at {name}, whose input is finite and output is not"))


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    return all(map(_finite, value)) if isinstance(value, tuple | list) else True


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> Tensor:
    """Three int64 sums over the bits of `tensor`; the strides let exchanged elements show as well."""
    bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    return torch.stack([bits[::stride].sum(dtype=torch.int64) for stride in (1, 3, 7)])
