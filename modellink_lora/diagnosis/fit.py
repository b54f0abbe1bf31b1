"""Whether a training run would start and fit here: its paths, its layout, and its memory, with nothing allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from modellink_lora.adapters.targets import AdaptedLinear, adapted_linears, resolve_targets
from modellink_lora.checkpoint.hf import read_config_json
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.config.parallel import ParallelConfig
from modellink_lora.config.train import SftDataConfig, TrainConfig
from modellink_lora.data.corpus import InstructionCorpus
from modellink_lora.diagnosis.finding import Finding
from modellink_lora.diagnosis.host import amount
from modellink_lora.models.families import family_of
from modellink_lora.models.presets import PRESETS, preset
from modellink_lora.parallel.partition import Partition
from modellink_lora.planning.memory import rank_memory
from modellink_lora.training.base import open_base
from modellink_lora.training.setup import choose_lora, partition_of
from modellink_lora.training.summary import plan_of

TOPIC = "run"
_ROOM = 0.9  # of the free memory: the rest is for the context, communication buffers and fragmentation
_T = TypeVar("_T")


@dataclass(frozen=True)
class Run:
    """A training run as its command says it. Nothing is opened.

    Attributes:
        world_size: processes; `per_host` of them on one host.
        given: fields that are typed, by config class.
        variables: of the script, by the flag that shows them.
    """

    world_size: int
    per_host: int
    given: Mapping[type, Mapping[str, Any]]
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def saves_to(self) -> str | None:
        return self.given[TrainConfig].get("save")


@dataclass(frozen=True)
class Here:
    """The devices that the run would get."""

    kind: str
    count: int
    free: int  # bytes of the fullest; on a CPU those that all processes of the host share


def fit_findings(run: Run, here: Here) -> list[Finding]:
    """A line for each input, for the layout, and for the memory of each pipeline stage."""
    return _Examination(run, here).findings()


class _Examination:
    """Goes on after a mistake, so that all of them are told at once."""

    def __init__(self, run: Run, here: Here) -> None:
        self.run, self.here, self.lines = run, here, list[Finding]()

    def findings(self) -> list[Finding]:
        run, given = self.run, self.run.given
        train = self._tried("training flags", lambda: TrainConfig(**given[TrainConfig]))
        data = self._tried("data flags", lambda: SftDataConfig(**given[SftDataConfig]))
        parallel = self._tried("layout flags", lambda: ParallelConfig(**given[ParallelConfig]))
        self._devices()
        if data:
            if corpus := self._tried("--data-path", lambda: InstructionCorpus(data.data_path[0])):
                self._say("--data-path", f"{len(corpus):,} samples in {data.data_path[0]}")
            self._tokenizer(data.tokenizer_name_or_path)
        if not (train and data and parallel):
            return self.lines
        model = self._model(train, data, parallel)
        replicas = self._tried("layout", lambda: parallel.data_parallel_size(run.world_size))
        samples = replicas and self._tried("batch", lambda: train.batch_size(replicas))
        if model is None or replicas is None or samples is None:
            return self.lines
        config, lora, linears = model
        partition = self._tried("layout", lambda: _layout(parallel, config))
        if partition is None:
            return self.lines
        cut = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
        self._say("layout", f"{run.world_size} processes = TP {parallel.tensor_model_parallel_size}"
                  f"{' with sequence parallel' if cut > 1 else ''} x PP {partition.stages} x DP {replicas}; "
                  f"{samples} samples a step, {train.dtype}")  # fmt: skip
        if data.seq_length > config.max_position_embeddings:
            longest = config.max_position_embeddings
            self._say("--seq-length", f"{data.seq_length} exceeds the model's {longest} positions", problem="lower it")

        def stages(train: TrainConfig) -> list[dict[str, int]]:
            plan = plan_of(
                train, config, lora, partition, tp=parallel.tensor_model_parallel_size, dp=replicas,
                sequence_parallel=cut > 1, length=data.padded_length(cut),
                micro_batches=samples // (train.micro_batch_size * replicas), device_type=self.here.kind,
            )  # fmt: skip
            return [rank_memory(plan, linears, stage=stage) for stage in range(partition.stages)]

        self._memory(train, config, stages)
        return self.lines

    def _devices(self) -> None:
        here, wanted = self.here, self.run.per_host
        kind = self.run.given[TrainConfig].get("device", "auto")
        if kind not in ("auto", here.kind):
            self._say("--device", f"the run asks for {kind}, this is an examination of {here.kind}",
                      warning=f"what follows holds for {here.kind}: give doctor --device {kind}")  # fmt: skip
        if here.kind == "cpu":
            self._say("devices", f"{wanted} processes on the CPU of this host")
        elif wanted > here.count:
            self._say("devices", f"{wanted} processes a host, this one has {here.count} of {here.kind}",
                      problem=f"set --nproc-per-node (GPUS_PER_NODE or NPUS_PER_NODE) to {here.count}, or take a host "
                      "with more")  # fmt: skip
        else:
            self._say("devices", f"{wanted} of {here.count} {here.kind} of this host")

    def _tokenizer(self, name: str | None) -> None:
        if name is None:
            return
        folder = Path(name)
        looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
        if folder.is_dir() and any(folder.glob("*token*")):
            self._say("--tokenizer-name-or-path", name)
        elif folder.is_dir():
            self._say("--tokenizer-name-or-path", f"{name} holds no tokenizer", problem="give the Hugging Face folder")
        elif looks_like_path:
            self._say("--tokenizer-name-or-path", f"{name}: no such folder", problem="give the Hugging Face folder")
        else:
            self._say("--tokenizer-name-or-path", f"{name}: not a folder here, so a name of the Hugging Face Hub",
                      warning="it will be downloaded")  # fmt: skip

    def _model(
        self, train: TrainConfig, data: SftDataConfig, parallel: ParallelConfig
    ) -> tuple[ModelConfig, LoraConfig, list[AdaptedLinear]] | None:
        """Dimensions and adapter; from what stands in for the checkpoint where that is not there yet."""
        flags, tp = self.run.given[ModelConfig], parallel.tensor_model_parallel_size
        if train.load is None or Path(train.load).exists():
            if train.load is None:
                self._say("--load", "not given", warning="the base would have RANDOM weights: give a checkpoint")
                if "vocab_size" not in flags:
                    self._say("model", "unknown", warning="memory is not estimated: give --load, or all dimensions")
                    return None
            base = self._tried("--load", lambda: open_base(
                train.load, flags, tp=tp, seed=train.seed, use_mcore_models=train.use_mcore_models
            ))  # fmt: skip
            if base is None:
                return None
            chosen = self._tried("adapter", lambda: choose_lora(self.run.given[LoraConfig], train.lora_load, base))
            config, origin = base.config, f"from {base.root or 'flags'}"
            lora = chosen[0] if chosen else None
        else:
            self._say("--load", f"{train.load}: no such folder", problem="convert the model first (convert_ckpt.py), "
                      "or name the folder that was converted")  # fmt: skip
            stand_in = self._tried("model", lambda: _stand_in(str(train.load), data.tokenizer_name_or_path))
            if stand_in is None:
                return None
            config, origin = stand_in
            config = dataclasses.replace(config, padded_vocab_size=config.padded_for(tp))
            lora = self._tried("adapter", lambda: _lora(self.run.given[LoraConfig]))
        self._say("model", f"{config.hf_model_type}, {config.num_layers} layers, hidden {config.hidden_size}, "
                  f"{config.parameter_count():,} parameters, {origin}")  # fmt: skip
        if lora is None:
            return None
        linears = self._tried("adapter", lambda: adapted_linears(family_of(config.hf_model_type), config, lora))
        if linears is None:
            return None
        self._say("adapter", f"r {lora.r}, alpha {lora.alpha:g} on {' '.join(lora.target_modules)}")
        return config, lora, linears

    def _memory(
        self, train: TrainConfig, config: ModelConfig, stages: Callable[[TrainConfig], list[dict[str, int]]]
    ) -> None:
        memory = stages(train)
        for stage, parts in enumerate(memory):
            detail = ", ".join(f"{name} {amount(size)}" for name, size in parts.items() if name != "total" and size)
            self._say(f"memory of a rank, stage {stage}" if len(memory) > 1 else "memory of a rank",
                      f"{amount(parts['total'])} of tensors at the longest samples: {detail}")  # fmt: skip
        sharing = self.run.per_host if self.here.kind == "cpu" else 1  # processes in one memory
        free, needed = self.here.free, sharing * max(parts["total"] for parts in memory)
        text = f"{amount(needed)} needed, {amount(free)} free" + (f" for {sharing} processes" if sharing > 1 else "")
        if beyond := config.beyond_llama():
            text += f"; {', '.join(beyond)} is not in this estimate, which knows Llama's layers"
        text += "; the CUDA graph keeps the activations a second time" * (train.cuda_graph_impl != "none")
        if needed <= _ROOM * free:
            self._say("fit", text)
            return
        kwargs = {"problem" if needed > free else "warning": self._smaller(train, stages, _ROOM * free / sharing)}
        self._say("fit", f"does not fit: {text}" if needed > free else f"tight: {text}", **kwargs)

    def _smaller(self, train: TrainConfig, stages: Callable[[TrainConfig], list[dict[str, int]]], room: float) -> str:
        """The first change of flags that fits."""
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        full = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
        tries: Sequence[tuple[str, dict[str, Any]]] = (
            ("--micro-batch-size 1", {"micro_batch_size": 1}), (full, recompute),
            (f"--micro-batch-size 1 {full}", {"micro_batch_size": 1, **recompute}),
        )  # fmt: skip
        for words, changes in tries:
            needed = max(parts["total"] for parts in stages(dataclasses.replace(train, **changes)))
            if needed <= room:
                return f"{words} would need {amount(needed)} a rank"
        return "raise --tensor-model-parallel-size or --pipeline-model-parallel-size, or lower --seq-length"

    def _tried(self, what: str, function: Callable[[], _T]) -> _T | None:
        try:
            return function()
        except UserError as error:
            self._say(what, str(error), problem=self._variables(what, str(error)) or "as it says")
            return None

    def _say(self, what: str, found: str, *, warning: str = "", problem: str = "") -> None:
        advice = problem or warning
        named = self._variables(what, found) if advice else ""
        if named and named not in advice:
            advice = f"{advice} ({named})"
        self.lines.append(Finding(TOPIC, what, found, "problem" if problem else "warning" if warning else "ok", advice))

    def _variables(self, *texts: str) -> str:
        """`CKPT_LOAD_DIR in the script`, of the flags that the texts name."""
        words = {word.strip(":,;()") for text in texts for word in text.split()}
        names = [variable for flag, variable in self.run.variables.items() if flag in words]
        return f"{', '.join(dict.fromkeys(names))} in the script" if names else ""


def _layout(parallel: ParallelConfig, config: ModelConfig) -> Partition:
    parallel.check_model(config)
    return partition_of(parallel, config.num_layers)


def _lora(given: Mapping[str, Any]) -> LoraConfig:
    return LoraConfig(**{**given, "target_modules": resolve_targets(given.get("target_modules", ()))})


def _stand_in(load: str, tokenizer: str | None) -> tuple[ModelConfig, str]:
    """Dimensions of a checkpoint that is not there yet: config.json beside the tokenizer, or a model its name tells."""
    if tokenizer and (Path(tokenizer) / "config.json").is_file():
        config = read_config_json(Path(tokenizer), flag="--tokenizer-name-or-path")
        where = f"{tokenizer}/config.json"
        return family_of(str(config.get("model_type"))).read_config(config, where=where), f"from {where}"
    for name in PRESETS:
        if name in load.lower().replace("llama2", "llama-2").replace("llama3", "llama-3"):
            return preset(name), f"as {name}, which --load's name suggests"
    raise UserError(
        f"memory is not estimated: --load {load} does not exist, and no config.json lies beside the tokenizer"
    )
