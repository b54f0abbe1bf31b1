"""Every guard stops the fault it is there for, in words that name it; with the guard taken out the run goes on."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest
import torch

from tests.helpers.spawn import run
from tests.helpers.tiny import tiny_model
from tests.helpers.training import (
    TARGETS,
    adapter_tensors,
    error_of,
    fine_tune_here,
    hf_to_megatron,
    losses,
    train_flags,
    write_corpus,
)

TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
FP16 = {"fp16": True, "initial_loss_scale": 2.0**10}
GUARDS = "modellink_lora.training.guards.Guards"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guards")
    write_corpus(folder / "data")
    return hf_to_megatron(tiny_model("llama", folder / "hf"), folder / "mg")


def arguments(base: Path, parallel: dict[str, Any], *, data: str | None = None, **train: Any) -> dict[str, Any]:
    return dict(
        train=train_flags(load=str(base), **{"train_iters": 5, **train}),
        data={"data_path": (data or str(base.parent / "data"),), "seq_length": 32},
        parallel=parallel,
        lora={"r": 4, "alpha": 8.0, "target_modules": TARGETS},
    )


# Faults, planted on the second process, or in the model of whichever process holds the layer.


def in_step(change: Callable[[Any], None], step: int = 2) -> Callable[[], Any]:
    """A fault that `change` brings about before a step, given the run's Loop."""

    @contextlib.contextmanager
    def planted() -> Iterator[None]:
        from modellink_lora.training.loop import Loop

        original = Loop.step

        def with_fault(self: Loop, batches: Any) -> Any:
            if self.progress.iteration == step - 1:
                change(self)
            return original(self, batches)

        with mock.patch.object(Loop, "step", with_fault):
            yield

    return planted


def parameter(loop: Any, ending: str) -> Any:
    """The parameter of this process whose global name ends so, or None."""
    return next((p for name, p in loop.guards._named_parameters() if name.endswith(ending)), None)


def drift(loop: Any) -> None:
    with torch.no_grad():
        if torch.distributed.get_rank() == 1:
            parameter(loop, "layers.1.mlp.linear_fc1.lora_A").view(-1)[3] += 1e-6


def drift_of_a_shard(loop: Any) -> None:
    with torch.no_grad():
        if torch.distributed.get_rank() == 1:  # only this tensor rank's replicas differ
            parameter(loop, "layers.1.mlp.linear_fc1.lora_B").view(-1)[3] += 1e-6


def flipped_bit(loop: Any) -> None:
    with torch.no_grad():
        if torch.distributed.get_rank() == 1:
            bits = parameter(loop, "layers.0.self_attention.linear_qkv.weight").view(torch.int32).view(-1)
            bits[5] ^= 1


def bad_output(loop: Any) -> None:
    for chunk in loop.chunks:
        for name, module in chunk.module.named_modules():
            if name.endswith("mlp.linear_fc2.base_layer") and loop.context.is_last_stage:
                module.register_forward_hook(lambda module, args, output: (output[0] / 0, output[1]))


def bad_weight(loop: Any) -> None:
    with torch.no_grad():
        if (weight := parameter(loop, "layers.1.mlp.linear_fc2.weight")) is not None:
            weight[0, 0] = float("nan")


def bad_gradient(loop: Any) -> None:
    if (factor := parameter(loop, "layers.0.mlp.linear_fc1.lora_B")) is not None:
        factor.register_hook(lambda gradient: gradient * float("inf"))


def silent_after_an_overflow(loop: Any) -> None:
    """One adapter's gradient is not finite in this step, and 0 in all later ones."""
    overflowing = loop.progress.iteration
    for factor in ("lora_A", "lora_B"):
        if (weight := parameter(loop, f"layers.0.mlp.linear_fc1.{factor}")) is not None:
            weight.register_hook(
                lambda gradient: (
                    (gradient + 1) * float("inf") if loop.progress.iteration == overflowing else gradient * 0
                )
            )


def before(target: str, replacement: Callable[..., Any]) -> Callable[[], Any]:
    """A fault, or a guard's removal, that replaces a function of the product."""
    return lambda: mock.patch(target, replacement)


def damaged_base(self: Any, iteration: int, *, frozen: bool = False) -> None:
    """Flips a bit before the first comparison of frozen weights."""
    if frozen and torch.distributed.get_rank() == 1:
        weight = next(p for name, p in self._named_parameters() if name.endswith("layers.0.mlp.linear_fc2.weight"))
        weight.view(torch.int32).view(-1)[5] ^= 1
    check_replicas(self, iteration, frozen=frozen)


def check_replicas(self: Any, iteration: int, *, frozen: bool) -> None: ...


@contextlib.contextmanager
def damaged_from_the_start() -> Iterator[None]:
    global check_replicas
    from modellink_lora.training.guards import Guards

    check_replicas = Guards.check_replicas  # type: ignore[assignment]
    with mock.patch.object(Guards, "check_replicas", damaged_base):
        yield


@contextlib.contextmanager
def switched_off() -> Iterator[None]:
    from modellink_lora.adapters.lora import LoraLinear

    original = LoraLinear.forward

    def forward(self: LoraLinear, x: torch.Tensor) -> Any:
        self.enabled = self.is_column
        return original(self, x)

    with mock.patch.object(LoraLinear, "forward", forward):
        yield


def nothing(*args: Any, **kwargs: Any) -> None: ...


# name: (layout, settings, fault, what the guard must say, how the guard is taken out)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Any, str, Any]] = {
    "adapters without effect": (
        TP2, {}, switched_off, "4 of 8 adapters received no gradient at all in the first 3 steps",
        before(f"{GUARDS}._require_gradients", nothing),
    ),
    "recompute of an input without gradient": (
        {}, FULL, before("modellink_lora.models.build.GPT.require_input_grad", nothing),
        "adapters received no gradient at all in the first 3 steps (first: decoder.layers.0.self_attention.linear_qkv)",
        before(f"{GUARDS}._require_gradients", nothing),
    ),
    "a short run without gradients": (
        TP2, {"train_iters": 2}, switched_off, "adapters received no gradient at all in the first 2 steps",
        before(f"{GUARDS}._require_gradients", nothing),
    ),
    "replicas that drift apart": (
        {}, {"check_weight_hash_across_dp_replicas_interval": 1}, in_step(drift),
        "iteration 2: decoder.layers.1.mlp.linear_fc1.lora_A is not the same on all data-parallel replicas: rank",
        before(f"{GUARDS}.check_replicas", nothing),
    ),
    "tensor ranks that drift apart": (
        TP2, {"check_weight_hash_across_dp_replicas_interval": 1}, in_step(drift),
        "is not the same on all tensor-parallel ranks: rank",
        before(f"{GUARDS}.check_replicas", nothing),
    ),
    "a base that differs between replicas": (
        {}, {}, damaged_from_the_start,
        "iteration 0: decoder.layers.0.mlp.linear_fc2.weight is not the same on all data-parallel replicas",
        before("modellink_lora.training.guards._difference", nothing),
    ),
    "an output that is not finite": (
        PP2, {}, in_step(bad_output),
        "iteration 2: the loss is nan; it begins at decoder.layers.1.mlp.linear_fc2, whose input is finite",
        before(f"{GUARDS}.before_update", nothing),
    ),
    "a weight that is not finite": (
        PP2, {}, in_step(bad_weight),
        "iteration 2: the loss is nan; the weight decoder.layers.1.mlp.linear_fc2.weight is not finite",
        before(f"{GUARDS}.before_update", nothing),
    ),
    "a gradient that is not finite": (
        PP2, {}, in_step(bad_gradient),
        "a gradient is not finite, nearest to the loss at decoder.layers.0.mlp.linear_fc1",
        before(f"{GUARDS}.before_update", nothing),
    ),
    "a gradient that is not finite and of no adapter": (
        {}, {}, before("modellink_lora.training.step.gradients_finite", lambda chunks: False),
        "a gradient is not finite, and it is none of the adapters': where it lies is not known",
        before(f"{GUARDS}.before_update", nothing),
    ),
    "an adapter whose only gradients are an overflow's": (
        {}, FP16, in_step(silent_after_an_overflow, step=1),
        "1 of 8 adapters received no gradient at all in the first 3 steps without overflow (first: decoder.layers.0",
        before(f"{GUARDS}._require_gradients", nothing),
    ),
}  # fmt: skip


def both(arguments: dict[str, Any], case: str) -> tuple[str, str]:
    """What the run says to the fault, with the guard and without."""
    *_, fault, _, removal = CASES[case]
    with fault():
        guarded = error_of(**arguments)
    with removal(), fault():
        unguarded = error_of(**arguments)
    return guarded, unguarded


@pytest.mark.parametrize("case", CASES)
def test_the_guard_stops_its_fault_and_only_the_guard_does(case: str, base: Path) -> None:
    parallel, settings, _, expected, _ = CASES[case]
    for guarded, unguarded in run(both, world_size=2, arguments=arguments(base, parallel, **settings), case=case):
        assert expected in guarded
        assert expected not in unguarded


def error_of_fault(arguments: dict[str, Any], fault: Callable[[Any], None]) -> str:
    """What the run says to a fault before its second step."""
    with in_step(fault)():
        return error_of(**arguments)


def test_replicas_of_one_tensor_rank_that_differ_end_every_process(base: Path) -> None:
    call = arguments(base, TP2, train_iters=3, check_weight_hash_across_dp_replicas_interval=1)
    said = run(error_of_fault, world_size=4, arguments=call, fault=drift_of_a_shard)
    assert len(said) == 4 and len(set(said)) == 1
    expected = "iteration 2: decoder.layers.1.mlp.linear_fc1.lora_B is not the same on all data-parallel replicas: rank"
    assert said[0].startswith(expected)


@pytest.mark.parametrize(
    ("settings", "fault", "skipped", "not_finite"),
    [(FP16, silent_after_an_overflow, 1, 0), ({"check_nan": False}, bad_gradient, 0, 2)],
    ids=["fp16 overflow", "bad gradient"],
)
def test_an_overflow_is_counted_as_skipped_and_only_other_bad_gradients_as_not_finite(
    settings: dict[str, Any], fault: Any, skipped: int, not_finite: int, base: Path, tmp_path: Path
) -> None:
    call = arguments(base, {}, train_iters=3, save=str(tmp_path), **settings)
    assert run(error_of_fault, world_size=2, arguments=call, fault=fault) == [""] * 2
    training = json.loads((tmp_path / "iter_0000003/training.json").read_text())
    assert (training["skipped"], training["not_finite"]) == (skipped, not_finite)


def data_guards(arguments: dict[str, Any], case: str) -> tuple[str, str]:
    """What the run says with the guard and without; a crash is what the guard is there to prevent."""
    target, replacement = REMOVALS[case]
    guarded = error_of(**arguments)
    with mock.patch(target, replacement):
        try:
            return guarded, error_of(**arguments)
        except (IndexError, RuntimeError) as crash:
            return guarded, type(crash).__name__


def retemplated(folder: Path) -> None:
    write_corpus(folder / "data")


def beyond(folder: Path) -> None:
    write_corpus(folder / "data", first_id=255)


def of_two_runs(folder: Path) -> None:
    write_corpus(folder / "data")
    write_corpus(folder / "other", seed=1)
    for ending in ("bin", "idx"):
        shutil.copy(folder / f"other_packed_labels_document.{ending}", folder / f"data_packed_labels_document.{ending}")


DATA_CASES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "ids past the embedding": (
        beyond,
        {},
        "among its input_ids, but the model has 259 tokens: preprocess with this model's own tokenizer",
    ),
    "another template": (retemplated, {"prompt_type": "llama2"}, "--prompt-type llama2 contradicts"),
    "labels of another set": (of_two_runs, {}, "the files are not of one run"),
}
REMOVALS: dict[str, tuple[str, Any]] = {
    "ids past the embedding": ("modellink_lora.training.data.check_corpus", lambda corpus, size: ""),
    "another template": ("modellink_lora.training.data._check_origin", nothing),
    "labels of another set": ("modellink_lora.data.corpus._require_same_lengths", nothing),
    "nothing to train": ("modellink_lora.data.sft_dataset.SftDataset.trains", lambda self: True),
    "another base": ("modellink_lora.training.setup.check_base", lambda *_: []),
}


@pytest.mark.parametrize("case", DATA_CASES)
def test_data_that_do_not_belong_to_the_run_are_refused(case: str, base: Path, tmp_path: Path) -> None:
    make, settings, expected = DATA_CASES[case]
    make(tmp_path)
    call = arguments(base, TP2, data=str(tmp_path / "data"), train_iters=1)
    call["data"] |= settings
    for guarded, unguarded in run(data_guards, world_size=2, arguments=call, case=case):
        assert expected in guarded
        assert expected not in unguarded


def test_an_adapter_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    other = hf_to_megatron(tiny_model("llama", tmp_path / "hf", seed=1), tmp_path / "mg")
    run(fine_tune_here, world_size=2, **arguments(base, TP2, save=str(tmp_path / "run"), train_iters=1))
    prefix = str(base.parent / "data")
    call = arguments(other, TP2, data=prefix, lora_load=str(tmp_path / "run"), finetune=True, train_iters=1)
    call["lora"] = {}
    for guarded, unguarded in run(data_guards, world_size=2, arguments=call, case="another base"):
        assert "was trained on another base than --load" in guarded
        assert not unguarded


def corpus_of(prefix: Path, samples: list[int], *, silent: tuple[int, ...] = ()) -> str:
    """These samples of `write_corpus`, of which some have nothing to train."""
    from modellink_lora.data.corpus import InstructionCorpus, writing_corpus

    source = InstructionCorpus(write_corpus(prefix.with_name("source")))
    with writing_corpus(str(prefix), {"prompt_type": "alpaca"}) as writer:
        for number in samples:
            ids, labels = (part.tolist() for part in source[number])
            writer.add(ids, [1] * len(ids), [-100] * len(ids) if number in silent else labels)
    return str(prefix)


@pytest.mark.parametrize("parallel", [{}, PP2], ids=["dp2", "pp2"])
def test_a_micro_batch_without_trained_tokens_is_counted_and_left_out(
    parallel: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    corpora = {"mixed": ([0, 1, 2, 3], (1, 3)), "spoken": ([0, 2], ())}
    for name, (samples, silent) in corpora.items():
        prefix = corpus_of(tmp_path / name, samples, silent=silent)
        call = arguments(base, parallel, data=prefix, save=str(tmp_path / f"{name}-run"), train_iters=1,
                         global_batch_size=len(samples))  # fmt: skip
        call["data"] |= {"shuffle": False}
        run(fine_tune_here, world_size=2, **call)
    found, expected = (losses(tmp_path / f"{name}-run") for name in corpora)
    assert found == pytest.approx(expected, rel=1e-6)
    for name, tensor in adapter_tensors(tmp_path / "spoken-run").items():
        torch.testing.assert_close(adapter_tensors(tmp_path / "mixed-run")[name], tensor, rtol=1e-4, atol=1e-6)
    rows = [json.loads(line) for line in (tmp_path / "mixed-run/metrics.jsonl").read_text().splitlines()]
    assert [row["empty micro-batches"] for row in rows if "empty micro-batches" in row] == [2]
    training = json.loads((tmp_path / "mixed-run/iter_0000001/training.json").read_text())
    assert training["empty_micro_batches"] == 2


def test_data_without_trained_tokens_are_refused(base: Path, tmp_path: Path) -> None:
    prefix = corpus_of(tmp_path / "data", [0, 1, 2, 3], silent=(0, 1, 2, 3))
    call = arguments(base, PP2, data=prefix, train_iters=1)
    for guarded, unguarded in run(data_guards, world_size=2, arguments=call, case="nothing to train"):
        expected = "no training sample has a trained token within --seq-length"
        assert expected in guarded and expected not in unguarded


def test_an_index_cache_of_another_program_changes_nothing(base: Path, tmp_path: Path) -> None:
    found = []
    for name in ("without", "with"):
        prefix = write_corpus(tmp_path / name / "data")
        if name == "with":  # what ModelLink would read back in place of shuffling, here made for other data
            cache = tmp_path / name / "data_train_indexmap_20ns_1234s_decoder_packed_shuffle_idx.npy"
            numpy.save(cache, numpy.full(20, 10**6))
        run(fine_tune_here, world_size=2, **arguments(base, TP2, data=prefix, save=str(tmp_path / f"{name}-run")))
        found.append(losses(tmp_path / f"{name}-run"))
    assert found[0] == found[1]
