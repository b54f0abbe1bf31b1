"""The time split of real steps of megatron-core's schedules, with delays whose place is known."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from tests.helpers.spawn import run

FORWARD, BACKWARD, LATE, DATA, OPTIMIZER = 0.08, 0.12, 0.16, 0.06, 0.1  # seconds
PAUSE = 0.4  # that no rate counts
MICRO_BATCHES = 2


class SlowMatmul(torch.autograd.Function):
    """x @ w, with a nap in each direction; on the last tensor rank another one, which its peers have to wait for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, late: bool) -> Tensor:
        ctx.save_for_backward(w)
        time.sleep(FORWARD + (LATE if late else 0))
        return x @ w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        time.sleep(BACKWARD)
        return grad @ ctx.saved_tensors[0].T, None, None


def measured_step(*, tp: int = 1, pp: int = 1, late: bool = False) -> dict[str, Any]:
    """Two steps, of which the second is measured; what this rank measured, and its wall time."""
    import torch.distributed as dist
    from megatron.core import tensor_parallel
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer import TransformerConfig

    from modellink_lora.config.parallel import ParallelConfig
    from modellink_lora.device import get_device
    from modellink_lora.parallel.context import make_context
    from modellink_lora.reporting.telemetry import Telemetry

    parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    context = make_context(parallel, torch.device("cpu"))
    config = TransformerConfig(
        num_layers=2, hidden_size=8, num_attention_heads=2, tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp, pipeline_dtype=torch.float32,
        calculate_per_token_loss=False,
    )  # fmt: skip

    class Stage(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            from megatron.core.enums import ModelType

            self.config, self.model_type = config, ModelType.encoder_or_decoder
            self.weight = torch.nn.Parameter(torch.eye(8))
            self.received: Tensor | None = None

        def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
            self.received = tensors[0]

        def forward(self, x: Tensor) -> Tensor:  # [s, b, h]
            x = x if self.received is None else self.received
            x = tensor_parallel.copy_to_tensor_model_parallel_region(x * self.weight.sum())
            x = SlowMatmul.apply(x, self.weight, late and context.tp_rank == tp - 1)
            return tensor_parallel.reduce_from_tensor_model_parallel_region(x)

    model = Stage()
    telemetry = Telemetry(
        get_device("cpu"), context, model_config=config, flops=lambda lengths: 1e9 * sum(lengths),
        dtype=torch.float32, log_interval=1,
    )  # fmt: skip

    def forward_step(data: Any, model: Stage) -> Any:
        return model(next(data)), lambda output: (output.sum(), {"loss": output.sum().detach()})

    def step() -> None:
        with telemetry.part("data"):
            time.sleep(DATA)
        batches = iter([torch.ones(4, 1, 8)] * MICRO_BATCHES)
        get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=batches, model=[model], num_microbatches=MICRO_BATCHES,
            seq_length=4, micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        dist.all_reduce(model.weight.grad, group=context.dp_group)
        with telemetry.part("optimizer"):
            time.sleep(OPTIMIZER)

    windows, wall = [], 0.0
    for iteration in (1, 2):
        begin = time.perf_counter()
        with telemetry.step(iteration):
            step()
        wall = time.perf_counter() - begin
        telemetry.count(lengths=[3, 5], trained_tokens=7)
        with telemetry.paused():
            time.sleep(PAUSE if iteration == 2 else 0)
        windows.append(telemetry.window())
    first, second = windows
    assert first.ranks is None and first.line() is None and config.timers is None
    return {"ranks": second.ranks, "rank": context.rank, "wall": wall, "window": second}


def spent(seconds: float, expected: float) -> None:
    """A nap lasts as long as it should, or somewhat longer on a busy machine."""
    assert expected - 0.002 <= seconds <= expected + 0.15


def waited(seconds: float, expected: float) -> None:
    """Waiting gets shorter, too, when the one that waits came late."""
    assert expected / 2 <= seconds <= expected + 0.15


def test_time_is_charged_where_it_is_spent_and_no_moment_is_lost() -> None:
    answers = run(measured_step, world_size=2)
    for answer, split in zip(answers, answers[0]["ranks"], strict=True):
        spent(split["forward"], MICRO_BATCHES * FORWARD)
        spent(split["backward"], MICRO_BATCHES * BACKWARD)
        spent(split["data"], DATA)
        spent(split["optimizer"], OPTIMIZER)
        assert split["tensor communication"] == split["pipeline communication"] == 0
        assert split["data communication"] > 0, "the sum of gradients over replicas"
        total = sum(seconds for part, seconds in split.items() if part != "memory")
        assert answer["wall"] - 0.15 < total <= answer["wall"], "all but the barrier before the step"
        assert split["memory"] > 50e6, "this process holds PyTorch"
        window = answer["window"]
        assert total <= window.seconds < answer["wall"] + PAUSE - 0.05, "what is paused is not counted"
        assert (window.tokens, window.trained_tokens, window.flops, window.devices) == (16, 7, 16e9, 2)


def test_waiting_for_a_slower_tensor_rank_is_tensor_communication() -> None:
    answers = run(measured_step, world_size=2, tp=2, late=True)
    quick, slow = answers[0]["ranks"]
    assert answers[0]["ranks"] == answers[1]["ranks"], "every rank knows all of them"
    waited(quick["tensor communication"], MICRO_BATCHES * LATE)
    spent(quick["forward"], MICRO_BATCHES * FORWARD)
    assert slow["tensor communication"] < MICRO_BATCHES * LATE / 2
    spent(slow["forward"], MICRO_BATCHES * (FORWARD + LATE))
    for split in (quick, slow):  # the all-reduce inside backward is no part of backward
        spent(split["backward"], MICRO_BATCHES * BACKWARD)


def test_the_bubble_of_a_pipeline_is_pipeline_communication() -> None:
    answers = run(measured_step, world_size=2, pp=2)
    for split in answers[0]["ranks"]:
        spent(split["forward"], MICRO_BATCHES * FORWARD)
        spent(split["backward"], MICRO_BATCHES * BACKWARD)
    first, last = answers[0]["ranks"]
    # two stages, two micro-batches: forward and backward of one micro-batch is the bubble of each stage
    waited(first["pipeline communication"], FORWARD + BACKWARD)
    waited(last["pipeline communication"], FORWARD)  # while the first goes backward last it is in its optimizer
