"""The planner: which layouts it lists, that they fit and divide, and that its command is one this program takes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from modellink_lora.adapters.targets import adapted_linears
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.plan import PlanConfig
from modellink_lora.models.families import family_of
from modellink_lora.models.presets import PRESETS, preset
from modellink_lora.planning.cost import Link, Machine, step_time
from modellink_lora.planning.machines import Assumed, calibrated, machine_of, save_calibration
from modellink_lora.planning.memory import rank_memory
from modellink_lora.planning.plan import Search, Workload, fit, launch_command, layouts, search, train_flags

TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def config(**changes: Any) -> PlanConfig:
    return PlanConfig(
        **{"model": "llama-2-7b", "devices": "8xH200", "seq_length": 4096, "global_batch_size": 32, **changes}
    )


def workload(name: str = "llama-2-7b", **changes: Any) -> Workload:
    model = preset(name)
    linears = adapted_linears(family_of(model.hf_model_type), model, LoraConfig(r=16, target_modules=TARGETS))
    settings: dict[str, Any] = dict(
        model=model, linears=linears, dtype="bf16", adapter_dtype="bf16", lora_dropout=0.0, seq_length=4096,
        global_batch_size=32, max_micro_batch_size=4,
    )  # fmt: skip
    return Workload(**{**settings, **changes})


def machine(**changes: Any) -> Machine:
    return dataclasses.replace(machine_of(config(), Assumed()), **changes)


@pytest.fixture(scope="module")
def tight() -> Search:
    """Llama-2-7B on 8 devices of 24 GB: some layouts fit, some with recomputation, some not."""
    return search(workload(), machine(memory=24e9), 8)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-2-7b", 6_738_415_616), ("llama-2-13b", 13_015_864_320), ("llama-2-70b", 68_976_648_192),
        ("llama-3-8b", 8_030_261_248), ("llama-3-70b", 70_553_706_496), ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-32b", 32_763_876_352), ("qwen2.5-72b", 72_706_203_648),
    ],
)  # fmt: skip
def test_presets_have_as_many_parameters_as_published(name: str, parameters: int) -> None:
    assert preset(name).parameter_count() == parameters
    assert name in PRESETS


def test_every_layout_divides_what_it_cuts() -> None:
    work = workload("qwen2.5-7b")  # 28 heads in 4 groups
    found = list(layouts(work, machine(), 32))
    assert {plan.tp for plan in found} == {1, 2, 4}
    assert {plan.partition.stages for plan in found} == {1, 2, 4}, "28 layers over 32 devices"
    assert any(plan.partition.chunks > 1 for plan in found) and any(plan.sequence_parallel for plan in found)
    for plan in found:
        stages, chunks = plan.partition.stages, plan.partition.chunks
        assert plan.tp * plan.dp * stages == 32
        assert plan.micro_batches * plan.micro_batch_size * plan.dp == 32
        assert plan.model.padded_vocab_size % plan.tp == 0
        assert sum(plan.partition.counts) == 28
        assert chunks == 1 or plan.micro_batches % stages == 0
    assert len({repr(plan) for plan in found}) == len(found)


def test_tensor_parallelism_stays_inside_a_host() -> None:
    assert max(plan.tp for plan in layouts(workload(), machine(per_host=4), 64)) == 4
    odd = list(layouts(workload("llama-2-13b", global_batch_size=24), machine(per_host=6), 12))
    assert {plan.tp for plan in odd} == {1, 2}, "40 heads do not divide by 3 or 6"


def test_what_is_listed_fits_and_the_fastest_comes_first(tight: Search) -> None:
    assert 0 < len(tight.fitting) < tight.considered
    for found in tight.fitting:
        linears = workload().linears
        every = [rank_memory(found.plan, linears, stage=stage)["total"] for stage in range(found.stages)]
        assert max(every) == found.memory["total"] <= 24e9
        assert found.time == step_time(found.plan, workload().ranks, machine(memory=24e9))
    times = [found.time.total for found in tight.fitting]
    assert all(later > 0.98 * earlier for earlier, later in itertools.pairwise(times))


def test_recomputation_comes_only_where_nothing_else_fits_and_as_little_as_possible(tight: Search) -> None:
    kinds = {found.plan.recompute_method for found in tight.fitting}
    assert None in kinds and "block" in kinds
    work = workload()
    for found in tight.fitting:
        plan = found.plan
        if plan.recompute_granularity is None:
            continue
        bare = dataclasses.replace(plan, recompute_granularity=None, recompute_method=None, recompute_num_layers=None)
        assert rank_memory(bare, work.linears, stage=0)["total"] > 24e9
        if plan.recompute_method == "block" and plan.recompute_num_layers and plan.recompute_num_layers > 1:
            fewer = dataclasses.replace(plan, recompute_num_layers=plan.recompute_num_layers - 1)
            assert max(rank_memory(fewer, work.linears, stage=s)["total"] for s in range(found.stages)) > 24e9
    assert all(fit(plan, work, machine(memory=1e15)).plan == plan for plan in list(layouts(work, machine(), 8))[:40])  # type: ignore[union-attr]


def test_more_memory_never_makes_the_best_slower_and_more_devices_never_either() -> None:
    work = workload()
    best = [search(work, machine(memory=size), 8).fitting[0].time.total for size in (20e9, 30e9, 60e9, 120e9)]
    assert all(later <= 1.01 * earlier for earlier, later in itertools.pairwise(best))
    more = [search(work, machine(), devices).fitting[0].time.total for devices in (1, 2, 4, 8, 16, 32)]
    assert more == sorted(more, reverse=True)


def test_nothing_that_fits_is_said_with_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    from modellink_lora.cli.plan import report

    with pytest.raises(UserError, match=r"none of \d+ layouts fits into 63\.\d GB.*needs \d+\.\d GB"):
        report(config(model="llama-2-70b", devices="1xH100", device_memory_gb=70), LoraConfig(target_modules=TARGETS))
    with pytest.raises(UserError, match="divides over 7 devices"):
        report(config(devices="7xH100"), LoraConfig(target_modules=TARGETS))


def test_the_printed_command_is_one_that_this_program_takes(capsys: pytest.CaptureFixture[str]) -> None:
    from modellink_lora.cli.accepted import ACCEPTED, REFUSED
    from modellink_lora.cli.flags import build_parser
    from modellink_lora.cli.main import main
    from modellink_lora.config.model import ModelConfig
    from modellink_lora.config.parallel import ParallelConfig
    from modellink_lora.config.train import SftDataConfig, TrainConfig
    from modellink_lora.parallel.partition import Partition

    words = ["plan", "--model", "llama-2-70b", "--devices", "64xh100", "--seq-length", "4096", "--global-batch-size",
             "64", "--lora-r", "32", "--lora-target-modules", "query_key_value", "linear_fc2", "--lora-dropout", "0.1",
             "--device-memory-gb", "40", "--max-micro-batch-size", "1"]  # fmt: skip
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "assumption" in out and "before: convert" in out
    command = shlex.split(out[out.index("torchrun") :].replace("\\\n", " "))
    assert command[command.index("--nnodes") + 1] == "8" and command[command.index("--nproc-per-node") + 1] == "8"
    parser = build_parser(
        "posttrain_gpt.py", "", [TrainConfig, SftDataConfig, LoraConfig, ParallelConfig, ModelConfig],
        refused=REFUSED, accepted=ACCEPTED,
    )  # fmt: skip
    given = parser.parse(command[command.index("posttrain_gpt.py") + 1 :])
    train, parallel = TrainConfig(**given[TrainConfig]), ParallelConfig(**given[ParallelConfig])
    lora, data = LoraConfig(**given[LoraConfig]), SftDataConfig(**given[SftDataConfig])
    assert (lora.r, lora.dropout, lora.target_modules) == (32, 0.1, ("linear_qkv", "linear_fc2"))
    assert (train.dtype, data.seq_length) == ("bf16", 4096)
    parallel.check_model(preset("llama-2-70b"))
    stages, per_chunk = parallel.pipeline_model_parallel_size, parallel.num_layers_per_virtual_pipeline_stage
    assert Partition.of(80, stages, None, per_chunk).stages == stages
    assert train.batch_size(parallel.data_parallel_size(64)) == 64


@pytest.mark.parametrize(
    "changes",
    [
        dict(recompute_granularity="selective"),
        dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=3),
        dict(distributed_optimizer=True),
        dict(dtype="fp32", adapter_dtype="fp32"),
    ],
)
def test_every_kind_of_layout_has_flags_that_train_config_takes(changes: dict[str, Any]) -> None:
    from modellink_lora.cli.flags import build_parser
    from modellink_lora.config.model import ModelConfig
    from modellink_lora.config.parallel import ParallelConfig
    from modellink_lora.config.train import SftDataConfig, TrainConfig

    work = workload()
    for plan in list(layouts(work, machine(), 8))[::7]:
        changed = dataclasses.replace(plan, **changes)
        found = fit(changed, work, machine(memory=1e15))
        assert found
        words = train_flags(found, work, load="BASE", lora=["--lora-r", "16"])
        parser = build_parser("", "", [TrainConfig, SftDataConfig, LoraConfig, ParallelConfig, ModelConfig])
        given = parser.parse(words)
        train, parallel = TrainConfig(**given[TrainConfig]), ParallelConfig(**given[ParallelConfig])
        assert (train.recompute_granularity, train.recompute_method, train.recompute_num_layers) == (
            changed.recompute_granularity, changed.recompute_method, changed.recompute_num_layers
        )  # fmt: skip
        assert train.use_distributed_optimizer == changed.distributed_optimizer and train.dtype == changed.dtype
        assert parallel.sequence_parallel == plan.sequence_parallel
        per_chunk = len(plan.partition.layers(0)) if plan.partition.chunks > 1 else None
        assert parallel.num_layers_per_virtual_pipeline_stage == per_chunk


def test_one_host_needs_no_addresses() -> None:
    work = workload()
    best = search(work, machine(), 8).fitting[0]
    words = launch_command(best, work, machine(), load="BASE", lora=[])
    assert words[:4] == ["torchrun", "--nproc-per-node", "8", "posttrain_gpt.py"]


def test_models_come_from_hugging_face_folders_and_checkpoints(tmp_path: Path) -> None:
    from modellink_lora.cli.plan import open_model
    from tests.helpers.tiny import tiny_model
    from tests.helpers.training import hf_to_megatron

    hf = tiny_model("llama", tmp_path / "hf")
    root = hf_to_megatron(hf, tmp_path / "megatron")
    model, load, before = open_model(str(hf))
    assert "convert_ckpt.py" in before and load == "hf-megatron"
    other, load, before = open_model(str(root))
    assert (load, before) == (str(root), "")
    assert (model.num_layers, model.hidden_size) == (other.num_layers, other.hidden_size)
    with pytest.raises(UserError, match="neither a folder nor one of llama-2-7b"):
        open_model("llama-5")


def test_flags_replace_the_numbers_of_the_table() -> None:
    changed = machine_of(
        config(device_memory_gb=10, memory_fraction=0.5, device_tflops=100, memory_bandwidth=1000, intra_bandwidth=200,
               inter_bandwidth=20, devices_per_host=16),
        Assumed(matmul=0.5, stream=0.5, link=0.5),
    )  # fmt: skip
    assert (changed.memory, changed.matmul, changed.stream, changed.per_host) == (5e9, 5e13, 5e11, 16)
    assert (changed.inside.bandwidth, changed.between.bandwidth) == (1e11, 1e10)
    with pytest.raises(UserError, match="V100 is not in the table"):
        machine_of(config(devices="8xV100"), Assumed())


def test_a_calibration_comes_back_as_it_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    measured = machine(name="cuda", memory=0.0, per_host=2, scatter=Link(1e-3, 1e9))
    save_calibration(path, measured, {"dtype": "bf16", "processes": 2, "device": "two"})
    read, facts = calibrated(path, config(devices_per_host=2, device_memory_gb=100, memory_fraction=0.5))
    assert read == dataclasses.replace(measured, memory=5e10) and facts["processes"] == 2
    with pytest.raises(UserError, match="measured in bf16, --dtype says fp32"):
        calibrated(path, config(dtype="fp32"))
    path.write_text(json.dumps({"matmul": 1}))
    with pytest.raises(UserError, match="not a calibration of this version"):
        calibrated(path, config())
    with pytest.raises(UserError, match="measure with --calibrate"):
        calibrated(tmp_path / "absent", config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model=""), "--model is missing"), (dict(devices="H200"), "say how many of which"),
        (dict(devices="0xH200"), "at least one"), (dict(seq_length=0), "--seq-length is missing"),
        (dict(global_batch_size=0), "--global-batch-size is missing"), (dict(memory_fraction=1.5), "at most 1"),
        (dict(device_tflops=-1.0), "must be at least 0"),
    ],
)  # fmt: skip
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        config(**changes)
