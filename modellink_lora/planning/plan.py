"""Which layouts of a model on so many devices fit, how long their step takes, and how the best is started. Pure.

Recomputation is used where a layout does not fit without it, and no more of it than it takes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modellink_lora.config.model import ModelConfig
from modellink_lora.parallel.partition import Partition
from modellink_lora.planning.cost import Machine, Time, step_time
from modellink_lora.planning.memory import Plan, rank_memory

if TYPE_CHECKING:
    from modellink_lora.adapters.targets import AdaptedLinear


@dataclass(frozen=True)
class Workload:
    """What every layout has to do."""

    model: ModelConfig
    linears: Sequence[AdaptedLinear]
    dtype: str
    adapter_dtype: str
    lora_dropout: float
    seq_length: int
    global_batch_size: int
    max_micro_batch_size: int

    @property
    def ranks(self) -> dict[str, int]:
        """Largest LoRA rank by target."""
        found: dict[str, int] = {}
        for linear in self.linears:
            name = linear.name.rsplit(".", 1)[-1]
            found[name] = max(found.get(name, 0), linear.r)
        return found


@dataclass(frozen=True)
class Candidate:
    """A layout with its predictions."""

    plan: Plan
    memory: Mapping[str, int]  # of the stage that needs most
    time: Time

    @property
    def stages(self) -> int:
        return self.plan.partition.stages

    @property
    def chunks(self) -> int:
        return self.plan.partition.chunks


@dataclass(frozen=True)
class Search:
    """Layouts that fit, fastest first, and how many there were."""

    fitting: list[Candidate]
    considered: int
    smallest: Candidate | None  # of those that do not fit, the one that lacks least


def search(work: Workload, machine: Machine, devices: int) -> Search:
    """All layouts of `work` on `devices` devices."""
    fitting, considered, smallest = [], 0, None
    for plan in layouts(work, machine, devices):
        considered += 1
        found = fit(plan, work, machine)
        if found is None:
            most = Candidate(plan, largest_memory(_recomputing(plan, "uniform", 1), work), Time())
            if smallest is None or most.memory["total"] < smallest.memory["total"]:
                smallest = most
            continue
        fitting.append(found)
    # times within about 1 % are no difference that this model can tell: then the smaller first
    fitting.sort(key=lambda c: (round(100 * math.log(c.time.total)), c.memory["total"]))
    return Search(fitting, considered, smallest)


def layouts(work: Workload, machine: Machine, devices: int) -> Iterator[Plan]:
    """Everything the program accepts: sizes that divide, tensor parallelism inside a host."""
    m = work.model
    for tp in _divisors(min(machine.per_host, devices)):
        if machine.per_host % tp and devices > machine.per_host:
            continue  # a host's devices would belong to groups of other hosts
        if any(size % tp for size in m.widths_cut_by_tp.values()):
            continue
        model = dataclasses.replace(m, padded_vocab_size=m.padded_for(tp))
        for pp in _divisors(m.num_layers):
            if devices % (tp * pp):
                continue
            dp = devices // (tp * pp)
            if work.global_batch_size % dp:
                continue
            per_replica = work.global_batch_size // dp
            for mbs in _divisors(per_replica):
                if mbs > work.max_micro_batch_size:
                    continue
                for chunks in _divisors(m.num_layers // pp) if pp > 1 else (1,):
                    if chunks > 1 and (per_replica // mbs) % pp:
                        continue  # the interleaved schedule works in rounds of as many micro-batches as stages
                    for sp in (True, False) if tp > 1 else (False,):
                        yield Plan(
                            model=model,
                            partition=Partition((m.num_layers // (pp * chunks),) * (pp * chunks), chunks),
                            tp=tp, dp=dp, sequence_parallel=sp, micro_batch_size=mbs,
                            length=-(-work.seq_length // tp) * tp if sp else work.seq_length,
                            micro_batches=per_replica // mbs, dtype=work.dtype, adapter_dtype=work.adapter_dtype,
                            lora_dropout=work.lora_dropout, lora_fusion=True, cpu=not machine.queued,
                        )  # fmt: skip


def fit(plan: Plan, work: Workload, machine: Machine) -> Candidate | None:
    """`plan` with as little recomputation as lets it fit, or None."""

    def tried(variant: Plan) -> Candidate | None:
        memory = largest_memory(variant, work)
        if memory["total"] > machine.memory:
            return None
        return Candidate(variant, memory, step_time(variant, work.ranks, machine))

    if found := tried(plan):
        return found
    if plan.dp > 1:
        plan = dataclasses.replace(plan, distributed_optimizer=True)
        if found := tried(plan):
            return found
    options = [tried(dataclasses.replace(plan, recompute_granularity="selective"))]
    layers = len(plan.partition.layers(0))
    if best := tried(_recomputing(plan, "uniform", 1)):
        low, high = 1, layers  # fewest layers of a chunk to recompute; more of them never need more memory
        while low < high:
            middle = (low + high) // 2
            if block := tried(_recomputing(plan, "block", middle)):
                best, high = block, middle
            else:
                low = middle + 1
        options.append(best)
    return min((c for c in options if c), key=lambda c: c.time.total, default=None)


def largest_memory(plan: Plan, work: Workload) -> dict[str, int]:
    """Of the stage that needs most: the first two, with most micro-batches in flight, or the last, with the logits."""
    few = dataclasses.replace(plan, micro_batches=min(plan.micro_batches, 4 * plan.partition.stages))  # steady by then
    last = plan.partition.stages - 1
    stages = {0, min(1, last), last}
    return max((rank_memory(few, work.linears, stage=stage) for stage in stages), key=lambda parts: parts["total"])


def launch_command(
    candidate: Candidate, work: Workload, machine: Machine, *, load: str, lora: Sequence[str]
) -> list[str]:
    """Words of the command that starts a layout on every host.

    Args:
        load: what stands behind --load.
        lora: flags of the adapter.
    """
    plan = candidate.plan
    devices = plan.tp * plan.dp * candidate.stages
    hosts = -(-devices // machine.per_host)
    words = ["torchrun"]
    if hosts > 1:
        words += ["--nnodes", str(hosts), "--node-rank", "$NODE_RANK"]
        words += ["--master-addr", "$MASTER_ADDR", "--master-port", "29500"]
    words += ["--nproc-per-node", str(min(devices, machine.per_host)), "posttrain_gpt.py"]
    return words + train_flags(candidate, work, load=load, lora=lora)


def train_flags(candidate: Candidate, work: Workload, *, load: str, lora: Sequence[str]) -> list[str]:
    """The program's own flags of a layout; data, steps and learning rate are the user's to change."""
    plan = candidate.plan
    words = ["--load", load, "--data-path", "DATA_PREFIX", "--save", "OUTPUT", "--train-iters", "1000", "--lr", "1e-4"]
    words += ["--seq-length", str(work.seq_length), "--global-batch-size", str(work.global_batch_size)]
    words += ["--micro-batch-size", str(plan.micro_batch_size)]
    words += ["--tensor-model-parallel-size", str(plan.tp)]
    words += ["--sequence-parallel"] if plan.sequence_parallel else []
    words += ["--pipeline-model-parallel-size", str(candidate.stages)]
    if candidate.chunks > 1:
        words += ["--num-layers-per-virtual-pipeline-stage", str(len(plan.partition.layers(0)))]
    words += ["--use-distributed-optimizer"] if plan.distributed_optimizer else []
    words += ["--lora-fusion"] if plan.lora_fusion else []
    if plan.recompute_granularity:
        words += ["--recompute-granularity", plan.recompute_granularity]
    if plan.recompute_method:
        words += ["--recompute-method", plan.recompute_method]
        words += ["--recompute-num-layers", str(plan.recompute_num_layers)]
    words += [f"--{plan.dtype}"] if plan.dtype != "fp32" else []
    return words + list(lora)


def step_flops(work: Workload) -> float:
    """Floating point operations of a step that belong to LoRA by definition: no recomputation counts."""
    from modellink_lora.planning.flops import lora_step_flops

    trainable = sum(linear.parameters for linear in work.linears)
    return lora_step_flops(work.model, trainable, [work.seq_length]) * work.global_batch_size


def describe_recompute(plan: Plan) -> str:
    if plan.recompute_granularity is None:
        return "none"
    if plan.recompute_granularity == "selective":
        return "attention"
    if plan.recompute_method == "uniform":
        return "all layers"
    return f"{plan.recompute_num_layers} of {len(plan.partition.layers(0))}"


def _recomputing(plan: Plan, method: str, layers: int) -> Plan:
    return dataclasses.replace(plan, recompute_granularity="full", recompute_method=method, recompute_num_layers=layers)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
