"""The self-check of a setup: its gradients against other layouts, finite differences and PEFT, and a verdict."""

from __future__ import annotations

import dataclasses
import gc
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor

from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.config.parallel import ParallelConfig
from modellink_lora.config.train import SftDataConfig, TrainConfig
from modellink_lora.config.verify import VerifyConfig, layout_name, other_layouts
from modellink_lora.data.corpus import writing_corpus
from modellink_lora.data.encode import IGNORED
from modellink_lora.device import Device
from modellink_lora.models.build import DTYPES
from modellink_lora.parallel.context import ParallelContext, make_context
from modellink_lora.reporting.report import print_table
from modellink_lora.training.assembly import Inputs, open_inputs
from modellink_lora.training.base import open_base
from modellink_lora.training.summary import memory_of
from modellink_lora.verification import peft as verify_peft
from modellink_lora.verification import slope
from modellink_lora.verification.run import Trace, run_layout, short, starting_factor, undecorated

LENGTH = 128  # of a sample, where the user names none
_FLOOR = 1e-2  # tensors smaller than this part of the largest are judged by that part


@dataclass(frozen=True)
class Check:
    """One line of the result: a comparison with its outcome, or why there was none."""

    what: str
    against: str
    difference: float = 0.0  # relative
    allowed: float = 0.0
    culprit: str = ""  # the worst tensor, or what happened
    skipped: str = ""

    @property
    def failed(self) -> bool:
        return not self.skipped and not self.difference <= self.allowed  # NaN fails


@dataclass(frozen=True)
class Session:
    """What all runs of one verification share."""

    train: TrainConfig
    data: SftDataConfig
    flags: Mapping[str, Mapping[str, Any]]  # model_flags and lora_flags: what the user typed
    users_data: bool
    device: Device
    torch_device: torch.device

    def open(self, parallel: ParallelConfig, train: TrainConfig) -> tuple[ParallelContext, Inputs]:
        """Lay the processes out anew and open everything for that layout."""
        context = make_context(parallel, self.torch_device)
        inputs = open_inputs(train, self.data, context, **self.flags)
        parallel.check_model(inputs.base.config)
        return context, inputs

    def missing_memory(self, inputs: Inputs, context: ParallelContext) -> str | None:
        """Why this layout cannot run here, the same on every process, or None."""
        stages = memory_of(
            inputs.data.train, inputs.base, inputs.lora, inputs.linears, inputs.partition, inputs.data, context
        )
        needed = max(stage["total"] for stage in stages)
        sharing = context.world_size if self.device.name == "cpu" else 1
        free = torch.tensor(self.device.free_memory() / sharing, device=context.device, dtype=torch.float32)
        dist.all_reduce(free, op=dist.ReduceOp.MIN)
        if 1.1 * needed < float(free):
            return None
        return f"needs {needed / 2**30:.1f} GiB a process, {float(free) / 2**30:.1f} are free"


def verify(
    verification: VerifyConfig, *, train: TrainConfig, data_flags: Mapping[str, Any], parallel: ParallelConfig,
    model_flags: Mapping[str, Any], lora_flags: Mapping[str, Any], device: Device, torch_device: torch.device,
) -> bool:  # fmt: skip
    """Run all checks and print them on rank 0; whether all passed. The default process group exists.

    Args:
        data_flags, model_flags, lora_flags: fields of the configs that the user typed.
    """
    torch.use_deterministic_algorithms(train.deterministic)
    processes, speaks = dist.get_world_size(), dist.get_rank() == 0
    train = short(train, steps=verification.verify_steps, processes=processes)
    model = open_base(train.load, model_flags, tp=1, seed=train.seed, use_mcore_models=train.use_mcore_models).config
    plain = undecorated(train)
    others = {layout_name(layout, processes): layout
              for layout in verification.layouts() or other_layouts(parallel, processes, model)}  # fmt: skip
    if plain != train and not verification.against:
        others = {f"{layout_name(parallel, processes)}, plain": parallel, **others}
    checks: list[Check] = []
    with tempfile.TemporaryDirectory() as folder:
        data = _samples(data_flags, model, train, Path(folder))
        flags = dict(model_flags=model_flags, lora_flags=lora_flags)
        session = Session(train, data, flags, bool(data_flags.get("data_path")), device, torch_device)
        own, found = _own(session, parallel, speaks)
        checks += found
        for name, other in ({} if own.stopped else others).items():
            checks += _against(session, name, other, plain, own, speaks)
    good = torch.tensor(int(_tell(checks)) if speaks else 0, device=torch_device)
    dist.broadcast(good, src=0)
    return bool(good)


def _own(session: Session, parallel: ParallelConfig, speaks: bool) -> tuple[Trace, list[Check]]:
    """Run the user's layout; what can be said of it without another."""
    train, name = session.train, layout_name(parallel, dist.get_world_size())
    context, inputs = session.open(parallel, train)
    obstacle = _no_slope(inputs, train)
    samples = session.data.data_path[0] if session.users_data else "random tokens"
    _progress(f"your layout, {name}: {context.world_size} processes, {train.dtype}, {train.train_iters} steps of "
              f"{inputs.data.batch_size} samples of {samples}", speaks)  # fmt: skip
    trace = run_layout(inputs, train, context, session.device, own=True, directions=0 if obstacle else 2)
    # the guards of training stop a run, and among them compare the bits that replicas hold
    stopped = trace.stopped or ""
    checks = [Check("steps under the guards of training", name, float(bool(stopped)), culprit=stopped)]
    for number, found in enumerate(trace.slopes, 1):
        what = f"gradient, direction {number}"
        culprit = f"{found.culprit}, most of all," if found.culprit else ""
        checks.append(Check(what, "finite differences", found.error, slope.ALLOWED, culprit))
    if obstacle:
        checks.append(Check("gradient", "finite differences", skipped=obstacle))
    gc.collect()
    checks += _against_peft(session, inputs, context, trace) if speaks else []
    return trace, checks


def _no_slope(inputs: Inputs, train: TrainConfig) -> str | None:
    """Why differences of the loss say nothing about its gradient, or None."""
    if train.dtype != "fp32" or inputs.lora.dtype not in (None, "fp32"):
        return f"the rounding of {train.dtype} hides small changes of the loss; run once without --{train.dtype}"
    if inputs.base.config.num_experts:
        return "the loss of a mixture of experts jumps where a token changes its experts, however small the step"
    return None


def _against_peft(session: Session, inputs: Inputs, context: ParallelContext, trace: Trace) -> list[Check]:
    train = session.train
    why = verify_peft.obstacle(inputs, train.dtype, session.device)
    if why:
        return [Check("loss and gradients", "PEFT", skipped=why)]
    _progress("transformers and PEFT in this process", True)
    alone = dataclasses.replace(context, dp_rank=0, dp_size=1)
    data = dataclasses.replace(inputs.data, context=alone)
    loss, gradients = verify_peft.peft_gradients(
        inputs, train, data.stream("train").take(data.micro_batches), starting_factor(inputs, train.seed),
        session.torch_device,
    )  # fmt: skip
    allowed = tolerance(train.dtype, inputs.lora.dtype, inputs.base.config.num_layers)
    return [
        Check("loss, no dropout", "PEFT", _relative(trace.plain_loss, loss), allowed),
        _worst("gradients, no dropout", "PEFT", trace.plain_gradients, gradients, allowed),
    ]


def _against(
    session: Session, name: str, parallel: ParallelConfig, train: TrainConfig, own: Trace, speaks: bool
) -> list[Check]:
    """Run another layout and compare."""
    try:
        context, inputs = session.open(parallel, train)
        why = session.missing_memory(inputs, context)
    except UserError as error:
        why = str(error)
    if why:
        return [Check("everything", name, skipped=why)]
    _progress(name, speaks)
    trace = run_layout(inputs, train, context, session.device, own=False, directions=0)
    gc.collect()
    if trace.stopped:
        return [Check("steps", name, 1.0, culprit=trace.stopped)]
    allowed = tolerance(train.dtype, inputs.lora.dtype, inputs.base.config.num_layers)
    pairs = [*zip(own.losses, trace.losses, strict=True), *zip(own.norms, trace.norms, strict=True)]
    numbers = max((_relative(found, expected) for found, expected in pairs), key=_nan_last)
    return [
        Check(f"losses and gradient norms of {train.train_iters} steps", name, numbers, allowed),
        _worst("gradients", name, own.gradients, trace.gradients, allowed),
        _worst("change of the adapter", name, own.change, trace.change, min(0.5, 3 * allowed**0.5)),
    ]


def tolerance(dtype: str, adapter_dtype: str | None, layers: int) -> float:
    """How far two right computations of a gradient may lie apart, relative to its norm (docs/verify.md).

    About 8 roundings a layer, forward and backward, reach the residual stream at full size. Each is off by at most
    the unit roundoff u, u / sqrt(3) on average, and they add up like a random walk.
    """
    coarsest = max(torch.finfo(DTYPES[name]).eps for name in (dtype, adapter_dtype or dtype)) / 2
    sums = 8 if coarsest == torch.finfo(torch.float32).eps / 2 else 1  # fp32 is also what long sums are rounded in
    return 4 * sums * coarsest * (8 * layers / 3) ** 0.5


def _worst(
    what: str, against: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], allowed: float
) -> Check:
    """The tensor with the largest difference relative to its norm. Empty everywhere but on rank 0."""
    if found.keys() != expected.keys():
        return Check(what, against, 1.0, 0.0, f"only one has {sorted(found.keys() ^ expected.keys())[0]}")
    largest = max((float(tensor.norm()) for tensor in expected.values()), default=0.0)
    errors = {
        name: float((found[name] - tensor).norm()) / max(float(tensor.norm()), _FLOOR * largest, 1e-30)
        for name, tensor in expected.items()
    }
    worst = max(errors, key=lambda name: _nan_last(errors[name]), default="")
    return Check(f"{what}, {len(expected)} tensors", against, errors.get(worst, 0.0), allowed, worst)


def _nan_last(error: float) -> float:
    """A key for max, which passes over NaN."""
    return math.inf if math.isnan(error) else error


def _relative(found: float, expected: float) -> float:
    return abs(found - expected) / max(abs(expected), 1e-30)


def _samples(flags: Mapping[str, Any], model: ModelConfig, train: TrainConfig, folder: Path) -> SftDataConfig:
    """The user's data, or random tokens of various lengths whose first third is not trained."""
    longest = min(filter(None, (LENGTH, model.max_position_embeddings, model.exact_length)))
    flags = {"seq_length": longest, **flags}
    if flags.get("data_path"):
        return SftDataConfig(**flags)
    random = numpy.random.RandomState(train.seed)
    with writing_corpus(str(folder / "random samples"), {}) as writer:
        for _ in range(train.global_batch_size * train.train_iters):
            length = random.randint(max(2, flags["seq_length"] // 4), flags["seq_length"] + 1)
            ids = random.randint(0, model.vocab_size, length).tolist()
            writer.add(ids, [1] * length, [IGNORED] * (length // 3) + ids[length // 3 :])
    return SftDataConfig(**{**flags, "data_path": (str(folder / "random samples"),), "split": "100,0,0"})


def _progress(line: str, speaks: bool) -> None:
    if speaks:
        print(f"verify: {line}", flush=True)


def _tell(checks: list[Check]) -> bool:
    """Print the table and the verdict; whether that is good."""
    rows = []
    for check in checks:
        numbers = ("", "") if check.skipped else (f"{check.difference:.1e}", f"{check.allowed:.1e}")
        result = "skipped" if check.skipped else "FAILED" if check.failed else "ok"
        rows.append((check.what, check.against, *numbers, result))
    print_table("self-check", rows, ("check", "compared with", "largest relative difference", "allowed", "result"))
    failed = [check for check in checks if check.failed]
    for check in checks:
        if check.skipped:
            print(f"skipped: {check.what} against {check.against}: {check.skipped}")
    for check in failed:
        how = f" differs by {check.difference:.1e}, allowed are {check.allowed:.1e}" if check.allowed else ""
        if math.isnan(check.difference):
            how = " is NaN or infinite: check the checkpoint, the adapter and the dtype"
        print(f"FAILED: {check.what} against {check.against}: {check.culprit or 'it'}{how}")
    done = sum(not check.skipped for check in checks)
    if failed:
        print(f"verdict: FAILED in {len(failed)} of {done} checks: do not trust a training run of this setup")
    elif done == 1:
        print("verdict: FAILED, there was nothing to compare with: start more processes or install peft")
        return False
    else:
        print(f"verdict: ok, all {done} checks passed, {len(checks) - done} skipped")
    return not failed
