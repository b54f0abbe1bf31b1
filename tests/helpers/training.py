"""A fine-tuning run inside a test's process group, and small generated data to train on."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch

TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def write_corpus(
    prefix: Path, *, samples: int = 32, seed: int = 0, longest: int = 24, first_id: int = 0, tokenizer: str = ""
) -> str:
    """Counting sequences with a question part that is not trained; returns the prefix for --data-path."""
    from modellink_lora.data.corpus import writing_corpus

    made_with = {}
    if tokenizer:
        from modellink_lora.data.tokenizer import load_tokenizer, tokenizer_fingerprint

        made_with["tokenizer_fingerprint"] = tokenizer_fingerprint(load_tokenizer(tokenizer, prompt_type="alpaca"))
    random = numpy.random.RandomState(seed)
    with writing_corpus(str(prefix), {"prompt_type": "alpaca", **made_with}) as writer:
        for _ in range(samples):
            length, start, step = random.randint(10, longest + 1), random.randint(0, 40), random.randint(1, 4)
            ids = [first_id + (start + step * i) % 8 for i in range(length)]
            question = random.randint(2, 5)
            writer.add(ids, [1] * length, [-100] * question + ids[question:])
    return str(prefix)


def train_flags(**changes: Any) -> dict[str, Any]:
    """Keyword arguments of TrainConfig for a short fp32 run."""
    return {
        "micro_batch_size": 1, "global_batch_size": 4, "train_iters": 10, "lr": 5e-3, "min_lr": 5e-3,
        "lr_decay_style": "constant", "eval_iters": 0, "log_interval": 100, "device": "cpu", **changes,
    }  # fmt: skip


def fine_tune_here(
    *,
    train: dict[str, Any],
    data: dict[str, Any],
    parallel: dict[str, Any],
    lora: dict[str, Any],
    model: dict[str, Any] | None = None,
    mutant: str | None = None,
    double: bool = False,
    device: Any = None,
    attempt: int = 0,
) -> None:
    """Run the whole job in this world's process group.

    Args:
        mutant: a deliberate error, see `mutated`.
        double: on a device that takes the double of Transformer Engine.
        device: a CPU of another kind.
        attempt: how often a launcher has started the job before.
    """
    from modellink_lora.config.parallel import ParallelConfig
    from modellink_lora.config.train import SftDataConfig, TrainConfig
    from modellink_lora.device import get_device
    from modellink_lora.training.job import fine_tune
    from tests.helpers.te import pretending

    with mutated(mutant):
        fine_tune(
            train=TrainConfig(**train),
            data=SftDataConfig(**{"split": "100,0,0", "variable_seq_lengths": True, **data}),
            parallel=ParallelConfig(**parallel),
            model_flags=model or {},
            lora_flags=lora,
            device=device or (pretending() if double else get_device("cpu")),
            torch_device=torch.device("cpu"),
            attempt=attempt,
        )


def error_of(**arguments: Any) -> str:
    """What `fine_tune_here` says to the user when it stops; empty if it runs through."""
    from modellink_lora.config.errors import UserError

    try:
        fine_tune_here(**arguments)
    except UserError as error:
        return str(error)
    return ""


# name of a deliberate error: what it replaces in adapters/fused_functions.py, and by what
FUSED_MUTANTS = {
    "no LoRA term in dX": [
        ("alpha=ctx.scale)", "alpha=0.0)"),  # column under SP
        ("multiply(gathered, wide, into)", "multiply(gathered[..., :o], wide[:o], into)"),  # row under SP, L2
        ("multiply(U, A, into)", "into.zero_()"),  # L0
    ],
    "no scaling": [("layer.scale", "1.0")],
    "rows of chunks in the order they arrive": [
        ("block(out, t, rows)", "out.view(-1, t, len(gathered[0]), out.shape[1])[rows.start // len(gathered[0])]"),
    ],
}


@contextmanager
def mutated(name: str | None) -> Iterator[None]:
    """Break the LoRA layers, plain and fused, in a named way, to show that a test notices."""
    from modellink_lora.adapters import fused, fused_functions
    from modellink_lora.adapters.lora import LoraLinear

    classes, functions = (LoraLinear, fused.FusedLoraLinear), dict(vars(fused_functions))
    names, inits, delta = (
        ("Unbordered", "ColumnBordered", "RowBordered"),
        [c.__init__ for c in classes],
        LoraLinear.delta,
    )
    assert name is None or name in FUSED_MUTANTS or name == "replicated factor not summed", name
    if name == "no LoRA term in dX":
        LoraLinear.delta = lambda self, x: delta(self, x.detach())
    if name == "replicated factor not summed":
        for broken, init in zip(classes, inits, strict=True):
            broken.__init__ = _unmarked(init)
    if name in FUSED_MUTANTS:
        source = inspect.getsource(fused_functions)
        for old, new in FUSED_MUTANTS[name]:
            assert old in source, f"nothing to break: {old}"
            source = source.replace(old, new)
        exec(compile(source, fused_functions.__file__, "exec"), vars(fused_functions))
        vars(fused).update({function: vars(fused_functions)[function] for function in names})
    try:
        yield
    finally:
        LoraLinear.delta = delta
        for whole, init in zip(classes, inits, strict=True):
            whole.__init__ = init
        vars(fused_functions).update(functions)
        vars(fused).update({function: functions[function] for function in names})


def _unmarked(init: Any) -> Any:
    def without_marks(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.lora_A.partial_over_tensor_ranks = self.lora_B.partial_over_tensor_ranks = False

    return without_marks


def losses(save: Path) -> list[float]:
    """Training loss of every step of a run, from its metrics.jsonl."""
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [row["lm loss"] for row in rows if "lm loss" in row]


def adapter_tensors(save: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest adapter below `save`."""
    from modellink_lora.checkpoint.adapter_kinds import open_adapter

    adapter = open_adapter(save)
    return {name: adapter.read(name) for name in adapter.shapes}


def hf_to_megatron(hf: Path, root: Path, *, tp: int = 1, stages: tuple[int, ...] | None = None) -> Path:
    """Convert a Hugging Face folder; `stages` are the layers of each pipeline stage."""
    from modellink_lora.checkpoint.hf import HfModel
    from modellink_lora.checkpoint.rank_writer import RankLayout, whole_shards, write_rank_files
    from modellink_lora.models.layouts import Vocab
    from modellink_lora.parallel.partition import Partition

    source = HfModel(hf)
    config = dataclasses.replace(source.config, padded_vocab_size=-(-source.config.vocab_size // tp) * tp)

    def read(name: str) -> torch.Tensor:
        layout = source.family.tensor(name, config).layout
        full = source.read(name)
        return layout.fuse([full]) if isinstance(layout, Vocab) else full

    partition = Partition(stages or (config.num_layers,))
    layout = RankLayout(config, tp, partition, "mcore", torch.float32)
    write_rank_files(root, layout, whole_shards(layout, read), hf_files=hf)
    return root
