"""A few training steps with layers of Transformer Engine, or of its double, and deliberate errors in the wiring."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

MUTANTS = ("the adapter reads what was not normed", "the adapter's gather is forgotten")


def pretending() -> Any:
    """A CPU for the double."""
    from modellink_lora.device.cpu import CpuDevice

    class Pretending(CpuDevice):
        runs_transformer_engine = True

    return Pretending()


def verify_here(
    *, train: dict[str, Any], data: dict[str, Any], parallel: dict[str, Any], lora: dict[str, Any]
) -> tuple[bool, str]:  # fmt: skip
    """`modellink-lora verify` in this world: its verdict, and what it said."""
    from modellink_lora.config.parallel import ParallelConfig
    from modellink_lora.config.train import TrainConfig
    from modellink_lora.config.verify import VerifyConfig
    from modellink_lora.verification.verify import verify

    with contextlib.redirect_stdout(io.StringIO()) as said:
        good = verify(
            VerifyConfig(), train=TrainConfig(**train), data_flags=data, parallel=ParallelConfig(**parallel),
            model_flags={}, lora_flags=lora, device=pretending(), torch_device=torch.device("cpu"),
        )  # fmt: skip
    return good, said.getvalue()


def trace_of(
    transformer_impl: str,
    *,
    train: dict[str, Any],
    data: dict[str, Any],
    parallel: dict[str, Any],
    lora: dict[str, Any],
    mutant: str | None = None,
    gpu: int | None = None,
) -> dict[str, Any]:
    """Losses and gradient norms of the steps, gradients of the first and what all changed, in full on rank 0.

    Args:
        gpu: of this process; None for the double on the CPU.
    """
    from modellink_lora.config.parallel import ParallelConfig
    from modellink_lora.config.train import SftDataConfig, TrainConfig
    from modellink_lora.device import get_device
    from modellink_lora.parallel.context import make_context
    from modellink_lora.training.assembly import open_inputs
    from modellink_lora.verification.run import run_layout

    device = pretending() if gpu is None else get_device("cuda")
    here = device.activate(gpu or 0)
    config = TrainConfig(**train, transformer_impl=transformer_impl)
    context = make_context(ParallelConfig(**parallel), here)
    with mutated(mutant):
        inputs = open_inputs(
            config, SftDataConfig(**{"split": "100,0,0", "variable_seq_lengths": True, **data}), context,
            model_flags={}, lora_flags=lora,
        )  # fmt: skip
        trace = run_layout(inputs, config, context, device, own=False, directions=0)
    return {field.name: getattr(trace, field.name) for field in dataclasses.fields(trace)}


@contextmanager
def mutated(name: str | None) -> Iterator[None]:
    from modellink_lora.adapters import lora

    kept, gather = lora.NormedLoraLinear.delta, lora.copy_to_tensor_model_parallel_region
    sp_gather = lora.gather_from_sequence_parallel_region
    if name == MUTANTS[0]:
        forward = lora.NormedLoraLinear.forward

        def unnormed(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            self.delta = lambda _: lora.LoraLinear.delta(self, x)
            return forward(self, x, *args, **kwargs)

        lora.NormedLoraLinear.forward = unnormed  # type: ignore[method-assign]
    elif name == MUTANTS[1]:
        lora.copy_to_tensor_model_parallel_region = lambda x, group: x
        # rows of the right number, all of them this rank's
        lora.gather_from_sequence_parallel_region = lambda x, group, **_: torch.cat([x] * group.size())
    else:
        assert name is None, name
        forward = None
    try:
        yield
    finally:
        lora.NormedLoraLinear.delta = kept  # type: ignore[method-assign]
        lora.copy_to_tensor_model_parallel_region = gather
        lora.gather_from_sequence_parallel_region = sp_gather
        if name == MUTANTS[0]:
            lora.NormedLoraLinear.forward = forward  # type: ignore[method-assign]
