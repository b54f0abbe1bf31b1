"""The launch scripts, without starting anything: names, flags, layouts, and the processes that would be started."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from modellink_lora.cli.convert import conversion_parser
from modellink_lora.cli.evaluate import evaluation_parser
from modellink_lora.cli.flags import Parser
from modellink_lora.cli.infer import inference_parser
from modellink_lora.cli.preprocess import preprocessing_parser
from modellink_lora.cli.train import training_parser
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.model import ModelConfig
from modellink_lora.config.parallel import ParallelConfig
from modellink_lora.config.train import SftDataConfig, TrainConfig
from tests.helpers.scripts import EXAMPLES, ROOT, SCRIPTS, command_of, environment, program_of, run_script

PARSERS: dict[str, Callable[[], Parser]] = {
    "preprocess_data.py": preprocessing_parser,
    "convert_ckpt.py": conversion_parser,
    "posttrain_gpt.py": functools.partial(training_parser, "posttrain_gpt.py"),
    "inference.py": inference_parser,
    "evaluation.py": evaluation_parser,
}
DEVICES = 8
DEVICE_BYTES = 57.6e9  # nine tenths of 64 GB: the rest is for the context, communication and fragments
SIZES = ("7b", "13b", "34b", "70b")
LLAMA2 = {
    "legacy": (
        "data_convert_llama2_instruction ckpt_convert_llama2_hf2legacy ckpt_convert_llama2_legacy2hf "
        "ckpt_convert_llama2_legacy2hf_lora ckpt_convert_llama2_legacy2legacy_lora chat_llama2_7b_ptd "
        "chat_llama2_13b_ptd chat_llama2_70b_ptd evaluate_llama2_7B_ptd evaluate_llama2_13B_ptd "
        "evaluate_llama2_34B_ptd evaluate_llama2_70B_ptd evaluate_llama2_7B_lora_ptd "
        "evaluate_llama2_7B_lora_mmlu_ptd generate_llama2_7b_ptd generate_llama2_13b_ptd generate_llama2_34B_ptd "
        "generate_llama2_70b_ptd"
    ),
    "mcore": (
        "data_convert_llama2_instruction ckpt_convert_llama2_hf2mcore ckpt_convert_llama2_mg2mg_lora "
        "ckpt_convert_llama2_mcore2hf_lora chat_llama2_7b_ptd chat_llama2_13b_ptd chat_llama2_70b_ptd "
        "evaluate_llama2_7b_agieval_ptd evaluate_llama2_7b_bbh_ptd evaluate_llama2_7b_boolq_ptd "
        "evaluate_llama2_7b_ceval_ptd evaluate_llama2_7b_humaneval_ptd evaluate_llama2_7b_mmlu_ptd "
        "evaluate_llama2_13b_ptd evaluate_llama2_34B_ptd evaluate_llama2_70B_ptd generate_llama2_7b_ptd "
        "generate_llama2_13b_ptd generate_llama2_34B_ptd generate_llama2_70b_ptd"
    ),
}


@pytest.mark.parametrize("names", LLAMA2)
def test_scripts_have_the_names_that_users_know(names: str) -> None:
    known = [*LLAMA2[names].split(), *(f"{job}_llama2_{s}_lora_ptd" for job in ("tune", "generate") for s in SIZES)]
    assert {f"{names}/llama2/{name}.sh" for name in known} <= set(SCRIPTS)


FAMILIES = "llama3 llama31 qwen25 qwen3 codellama minicpm gemma bloom index mixtral"


@pytest.mark.parametrize("family", FAMILIES.split())
def test_a_family_has_a_script_for_each_step(family: str) -> None:
    there = {name.rpartition("/")[2] for name in SCRIPTS if name.startswith(f"mcore/{family}/")}
    assert {f"data_convert_{family}_instruction.sh", f"ckpt_convert_{family}_hf2mcore.sh"} <= there
    jobs = {name.partition("_")[0] for name in there if name.endswith("_lora_ptd.sh")}
    assert jobs == (set() if family == "mixtral" else {"tune", "generate", "evaluate"})  # adapters sit on experts there
    merges = {f"ckpt_convert_{family}_mcore2hf_lora.sh", f"ckpt_convert_{family}_mg2mg_lora.sh"}
    assert family == "mixtral" or merges <= there


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_prints_a_command_that_its_program_takes_and_types_no_dimension(script: str, tmp_path: Path) -> None:
    command = command_of(script, cwd=tmp_path)
    assert not list(tmp_path.iterdir()), "--dry-run has left something"
    program, words = program_of(command)
    given = PARSERS[program]().parse(words)
    assert not given.get(ModelConfig), "dimensions come from the checkpoint"
    if program != "posttrain_gpt.py":
        assert not given.get(LoraConfig), "rank, alpha and targets are read from the adapter"
    if ParallelConfig in given:
        processes = int(command[command.index("--nproc-per-node") + 1]) if "--nproc-per-node" in command else 1
        ParallelConfig(**given[ParallelConfig]).data_parallel_size(processes)  # raises where they do not fit
        assert processes <= DEVICES
    if program == "posttrain_gpt.py":
        SftDataConfig(**given[SftDataConfig])
        lora = LoraConfig(**given[LoraConfig])
        assert (lora.r, lora.alpha) == (16, 32.0)
        legacy = script.startswith("legacy")
        assert ("query_key_value" in lora.target_modules) == legacy == ("--use-mcore-models" not in words)
        assert TrainConfig(**given[TrainConfig]).bf16


@pytest.mark.parametrize(
    ("script", "model"),
    [
        *((f"{n}/llama2/tune_llama2_{s}_lora_ptd.sh", f"llama-2-{s}") for n in LLAMA2 for s in ("7b", "13b", "70b")),
        ("mcore/llama3/tune_llama3_8b_lora_ptd.sh", "llama-3-8b"),
        ("mcore/llama3/tune_llama3_70b_lora_ptd.sh", "llama-3-70b"),
        ("mcore/qwen25/tune_qwen25_7b_lora_ptd.sh", "qwen2.5-7b"),
    ],
)
def test_the_layout_of_a_script_fits_its_devices_at_full_length(script: str, model: str, tmp_path: Path) -> None:
    from modellink_lora.adapters.targets import adapted_linears, resolve_targets
    from modellink_lora.models.families import family_of
    from modellink_lora.models.presets import preset
    from modellink_lora.parallel.partition import Partition
    from modellink_lora.planning.memory import Plan, rank_memory

    given = training_parser("").parse(program_of(command_of(script, cwd=tmp_path))[1])
    parallel, train = ParallelConfig(**given[ParallelConfig]), TrainConfig(**given[TrainConfig])
    size, lora = preset(model), LoraConfig(**given[LoraConfig])
    size = dataclasses.replace(size, padded_vocab_size=size.padded_for(parallel.tensor_model_parallel_size))
    lora = dataclasses.replace(lora, target_modules=resolve_targets(lora.target_modules))
    linears = adapted_linears(family_of(size.hf_model_type), size, lora)
    stages = parallel.pipeline_model_parallel_size
    copies = parallel.data_parallel_size(DEVICES)
    plan = Plan(
        model=size, partition=Partition.of(size.num_layers, stages), tp=parallel.tensor_model_parallel_size,
        dp=copies, sequence_parallel=parallel.sequence_parallel, micro_batch_size=train.micro_batch_size,
        length=SftDataConfig(**given[SftDataConfig]).seq_length,
        micro_batches=train.global_batch_size // train.micro_batch_size // copies, dtype="bf16", adapter_dtype="bf16",
        lora_fusion=train.lora_fusion, cpu=False,
    )  # fmt: skip
    most = max(rank_memory(plan, linears, stage=stage)["total"] for stage in range(stages))
    assert most < DEVICE_BYTES, f"{most / 1e9:.1f} GB"


def kind(script: str) -> tuple[str, ...]:
    """What scripts have in common that differ in names and numbers only."""
    words = Path(script).stem.split("_")
    return script.partition("/")[0], words[0], words[3] if "convert" in words else "", str("lora" in words)


FIRST_OF_KIND = list({kind(script): EXAMPLES / script for script in SCRIPTS}.values())


@pytest.mark.parametrize(
    "scripts",
    [
        [
            *FIRST_OF_KIND,
            *EXAMPLES.glob("*.sh"),
            *EXAMPLES.glob("slurm/*.sh"),
            ROOT / "tests/versions.sh",
            ROOT / ".ci/run",
        ],
        pytest.param([path for path in EXAMPLES.glob("*/*/*.sh") if path not in FIRST_OF_KIND], marks=pytest.mark.slow),
    ],
    ids=["one of a kind", "the others"],
)
def test_shellcheck_has_nothing_to_say(scripts: list[Path]) -> None:
    done = subprocess.run(
        ["shellcheck", *map(str, scripts)], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


TUNE = "mcore/llama2/tune_llama2_7b_lora_ptd.sh"
SLURM = {
    "SLURM_STEP_ID": 0, "SLURM_JOB_ID": 123456, "SLURM_STEP_NUM_NODES": 2, "SLURM_NODEID": 1, "MASTER_ADDR": "n1",
    "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_LOCALID": 1, "SLURM_PROCID": 3, "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "start"),
    [
        ({"GPUS_PER_NODE": 1}, "python P"),
        ({"NPUS_PER_NODE": 4}, "python -m torch.distributed.run --nproc-per-node 4 --standalone -- P"),
        (
            {"GPUS_PER_NODE": 4, "NNODES": 2, "NODE_RANK": 1, "MASTER_ADDR": "n1", "MASTER_PORT": 6000},
            "python -m torch.distributed.run --nproc-per-node 4 --nnodes 2 --node-rank 1 --master-addr n1 "
            "--master-port 6000 -- P",
        ),
        (
            {"NNODES": 2, "RDZV_ENDPOINT": "n1:29500", "RDZV_ID": "x"},
            "python -m torch.distributed.run --nproc-per-node 8 --nnodes 2 --rdzv-backend c10d "
            "--rdzv-endpoint n1:29500 --rdzv-id x -- P",
        ),
        (
            {**SLURM, "SLURM_STEP_NUM_TASKS": 2, "GPUS_PER_NODE": 2},
            "python -m torch.distributed.run --nproc-per-node 2 --nnodes 2 --node-rank 1 --master-addr n1 "
            "--master-port 23456 -- P",
        ),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": 4}, "python P"),
    ],
    ids=["one device", "one host", "hosts by number", "hosts that meet", "slurm, torchrun", "slurm, a task a rank"],
)
def test_the_launcher_starts_what_the_place_asks_for(variables: dict[str, object], start: str, tmp_path: Path) -> None:
    command = command_of(TUNE, cwd=tmp_path, **variables)
    program = str(ROOT / "posttrain_gpt.py")
    assert command[: command.index(program) + 1] == start.replace("P", program).split()


def test_the_host_that_has_the_endpoints_address_holds_the_meeting(tmp_path: Path) -> None:
    mine = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()
    if not mine:
        pytest.skip("this machine has no address of its own")
    meeting = {"NNODES": 2, "cwd": tmp_path}
    assert "is_host=1" in command_of(TUNE, **meeting, RDZV_ENDPOINT=f"{mine[0]}:29500")
    assert "is_host=1" not in command_of(TUNE, **meeting, RDZV_ENDPOINT=f"{mine[0]}1:29500")


def test_hosts_without_a_first_one_are_an_error(tmp_path: Path) -> None:
    done = run_script(TUNE, "--dry-run", cwd=tmp_path, NNODES=2)
    assert done.returncode != 0 and "MASTER_ADDR" in done.stdout, done.stdout


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A program in Python's place that tells what it was started with."""
    program = tmp_path / "bin/python"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/bash\necho "rank=${RANK:-} of ${WORLD_SIZE:-} $LOCAL_RANK/$LOCAL_WORLD_SIZE"\n'
        'echo "at ${MASTER_ADDR:-}:${MASTER_PORT:-} cann=${CANN_IS:-}"\nprintf "<%s>" "$@"\nexit 7\n'
    )
    program.chmod(0o755)
    return program


def test_a_task_that_slurm_started_as_a_rank_knows_its_place(stand_in: Path, tmp_path: Path) -> None:
    done = run_script(TUNE, cwd=tmp_path, PYTHON=stand_in, LOG="", **SLURM, SLURM_STEP_NUM_TASKS=4)
    assert "rank=3 of 4 1/2\nat n1:23456 cann=\n" in done.stdout


def test_words_status_log_and_cann_pass_through(stand_in: Path, tmp_path: Path) -> None:
    toolkit = tmp_path / "cann"
    toolkit.mkdir()
    (toolkit / "set_env.sh").write_text('export CANN_IS="there$NEVER_SET"\n')
    done = run_script(
        TUNE, "--save", "a folder", cwd=tmp_path, PYTHON=stand_in, LOG="logs/x/tune.log", ASCEND_TOOLKIT_HOME=toolkit,
        LOCAL_RANK=0, LOCAL_WORLD_SIZE=1,
    )  # fmt: skip
    assert done.returncode == 7 and done.stdout.endswith("<--save><a folder>"), done.stdout
    assert "cann=there" in done.stdout
    assert (tmp_path / "logs/x/tune.log").read_text() == done.stdout


def test_a_tuning_script_goes_on_from_its_own_checkpoint_and_from_no_other(tmp_path: Path) -> None:
    def loaded(**variables: object) -> str | None:
        words = command_of(TUNE, cwd=tmp_path, CKPT_SAVE_DIR="out", **variables)
        return words[words.index("--lora-load") + 1] if "--lora-load" in words else None

    assert loaded() is None
    (tmp_path / "out").mkdir()
    assert loaded() is None
    (tmp_path / "out/latest_checkpointed_iteration.txt").write_text("5")
    assert loaded() == "out" and loaded(LORA_CHECKPOINT="mine") == "mine"
