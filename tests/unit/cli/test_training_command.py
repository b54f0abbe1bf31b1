"""A training command, or the script that prints it, is read without being started."""

from __future__ import annotations

from pathlib import Path

import pytest

from modellink_lora.cli.training_command import command_of, read_command, variables_of
from modellink_lora.config.errors import UserError
from modellink_lora.config.parallel import ParallelConfig

SCRIPT = """
set -euo pipefail
CKPT_LOAD_DIR=${CKPT_LOAD_DIR:-./my base}
echo "looking around"
set -- torchrun --nproc-per-node "${GPUS_PER_NODE:-8}" posttrain_gpt.py --load "$CKPT_LOAD_DIR" \\
    --tensor-model-parallel-size=${TP:-2} --lora-r 8
if [ "${1:-}" != --dry-run ] || true; then printf '%q ' "$@"; echo; fi  # --dry-run
"""


def processes(*launcher: str, devices: int = 4) -> tuple[int, int]:
    run = read_command([*launcher, "posttrain_gpt.py", "--lora-r", "8"], devices=devices)
    return run.world_size, run.per_host


def test_the_command_is_the_last_line_and_its_words_are_unquoted(tmp_path: Path) -> None:
    script = tmp_path / "tune.sh"
    script.write_text(SCRIPT)
    words = command_of(script)
    assert words[:4] == ["torchrun", "--nproc-per-node", "8", "posttrain_gpt.py"] and "./my base" in words
    assert variables_of(script) == {
        "--nproc-per-node": "GPUS_PER_NODE", "--load": "CKPT_LOAD_DIR", "--tensor-model-parallel-size": "TP"
    }  # fmt: skip


def test_a_script_without_a_dry_run_is_not_started(tmp_path: Path) -> None:
    script = tmp_path / "mine.sh"
    script.write_text(f"touch {tmp_path}/started\n")
    with pytest.raises(UserError, match="takes no --dry-run; give its command instead"):
        command_of(script)
    assert not (tmp_path / "started").exists()


def test_a_script_that_fails_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    script = tmp_path / "tune.sh"
    script.write_text("# --dry-run\nset -u\necho $NOWHERE_SET\n")
    with pytest.raises(UserError, match=r"status 1: .*NOWHERE_SET: unbound variable"):
        command_of(script)
    with pytest.raises(UserError, match="no such file"):
        command_of(tmp_path / "other.sh")


def test_launchers_say_how_many_processes_there_are() -> None:
    assert processes("python") == (1, 1)
    assert processes("torchrun", "--nproc-per-node", "8", "--standalone", "--") == (8, 8)
    assert processes("python", "-m", "torch.distributed.run", "--nproc_per_node=4", "--nnodes", "2") == (8, 4)
    assert processes("torchrun", "--nnodes=1:3", "--nproc-per-node", "gpu") == (12, 4)
    assert processes("srun", "--ntasks", "16", "--nodes", "2", "python") == (16, 8)


def test_all_names_of_the_training_program_are_known() -> None:
    for words in (["./pretrain_gpt.py"], ["-m", "modellink_lora", "train"], ["/bin/modellink-lora", "train"]):
        run = read_command(["python", *words, "--tensor-model-parallel-size", "2"], devices=1)
        assert run.given[ParallelConfig] == {"tensor_model_parallel_size": 2}


def test_other_commands_and_wrong_flags_are_errors_of_one_line() -> None:
    with pytest.raises(UserError, match=r"not a training command: python convert_ckpt\.py"):
        read_command(["python", "convert_ckpt.py", "--load-dir", "x"], devices=1)
    with pytest.raises(UserError, match=r"unknown flag --lord \(did you mean --load\?\)"):
        read_command(["posttrain_gpt.py", "--lord", "x"], devices=1)
