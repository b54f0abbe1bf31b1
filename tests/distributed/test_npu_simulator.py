"""The real torch_npu on a simulated NPU: its communication and fused operators mean what plain PyTorch means.

Each test asks for one program of tests/distributed/npu_programs.py; torchrun starts the processes.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

from tests.helpers.npu import REPOSITORY, run_on_simulated_npu, simulator_environment, skip_without_simulator

# Programs that follow each other in the same processes: starting them takes longer than all of these.
TOGETHER = {
    1: ("fused_operators", "random_numbers", "product", "broken_operators"),
    2: ("collectives", "point_to_point", "joined_products"),
    3: ("subsets",),
}


@functools.cache
def together(processes: int) -> subprocess.CompletedProcess[str]:
    return run(processes, *TOGETHER[processes])


def run(processes: int, *programs: str, **env: str) -> subprocess.CompletedProcess[str]:
    return run_on_simulated_npu("tests.distributed.npu_programs", programs, processes, env=env, timeout=280)


def succeeds(program: str) -> None:
    processes = next(processes for processes, programs in TOGETHER.items() if program in programs)
    done = together(processes)
    for rank in range(processes):
        assert f"rank {rank} has done {program}" in done.stdout, done.stdout[-2000:] + done.stderr[-6000:]


def test_collectives_equal_their_definition_for_short_and_long_messages() -> None:
    succeeds("collectives")


def test_messages_longer_than_the_ring_pass_in_both_directions_at_once() -> None:
    succeeds("point_to_point")


def test_any_subset_of_processes_forms_a_group() -> None:
    succeeds("subsets")


def test_fused_operators_and_their_derivatives_equal_plain_pytorch() -> None:
    succeeds("fused_operators")


def test_generator_state_decides_dropout() -> None:
    succeeds("random_numbers")


def test_our_npu_device_uses_the_fused_operators_within_their_limits_and_while_they_are_wanted() -> None:
    succeeds("product")


def test_operators_that_are_absent_or_compute_something_else_are_found_out_at_the_start() -> None:
    succeeds("broken_operators")


def test_products_joined_with_a_collective_equal_plain_pytorch_and_are_refused_outside_their_limits() -> None:
    succeeds("joined_products")


def test_ranks_that_call_different_collectives_are_stopped_with_both_calls() -> None:
    done = run(2, "disagreement")
    assert done.returncode != 0
    assert "calls AllReduce of 4 elements" in done.stderr and "rank 0 calls AllReduce of 3 elements" in done.stderr


def test_a_missing_rank_ends_in_a_message_and_not_in_a_hang() -> None:
    done = run(2, "absence", NPU_SIM_TIMEOUT="3")
    assert done.returncode != 0
    assert "npu_sim: rank 0 of 2" in done.stderr and "waited 3 s" in done.stderr


def test_torch_npu_without_cann_is_explained_and_another_device_is_taken(tmp_path: Path) -> None:
    skip_without_simulator()
    script = tmp_path / "ask.py"
    script.write_text(
        "from modellink_lora.device import get_device\n"
        "from modellink_lora.config.errors import UserError\n"
        "print('auto is', get_device('auto').name)\n"
        "try:\n    get_device('npu')\n"
        "except UserError as error:\n    print(error)\n"
    )
    environment = simulator_environment()
    environment.pop("LD_LIBRARY_PATH")  # the wheel is there, CANN is not
    done = subprocess.run(
        [sys.executable, script], env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] != "auto is npu" and len(lines) == 2, lines
    assert lines[1].startswith("--device npu: torch_npu does not load (lib") and "set_env.sh" in lines[1], lines
