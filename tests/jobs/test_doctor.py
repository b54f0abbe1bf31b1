"""`modellink-lora doctor` in real processes: what it finds, what it writes, what it ends with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.jobs import ROOT, TORCHRUN, Job, kill
from tests.helpers.npu import run_on_simulated_npu
from tests.helpers.tiny import tiny_model
from tests.helpers.training import hf_to_megatron, write_corpus

DOCTOR = ("-m", "modellink_lora", "doctor")
SCRIPT = """
# a script like those of examples/
set -euo pipefail
set -- {python} -m torch.distributed.run --standalone --nproc-per-node "${{GPUS_PER_NODE:-2}}" posttrain_gpt.py \\
    --load "${{CKPT_LOAD_DIR:-{load}}}" --save "${{CKPT_SAVE_DIR:-{save}}}" --data-path "${{DATA_PATH:-{data}}}" \\
    --tensor-model-parallel-size "${{TP:-2}}" --seq-length 32 --lora-r 8 --lora-alpha 16 \\
    --lora-target-modules linear_qkv linear_proj --lr 1e-3 --train-iters 5 --bf16 "$@"
words=()
for word in "$@"; do if [ "$word" != --dry-run ]; then words+=("$word"); fi; done
if [ "${{#words[@]}}" -lt $# ]; then printf '%q ' "${{words[@]}}"; echo; exit 0; fi
touch {started}
"""


def run(*words: object, launcher: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    here = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MODELLINK_DEVICE": "cpu"}
    return subprocess.run(
        [sys.executable, *launcher, *map(str, words)], cwd=ROOT, env={**os.environ, **here, **environment},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def findings(file: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(f["topic"], f["what"]): f for f in json.loads(file.read_text())["findings"]}


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    load = hf_to_megatron(tiny_model("llama", folder / "hf"), folder / "mg")
    path = folder / "tune.sh"
    path.write_text(SCRIPT.format(python=sys.executable, load=load, save=folder / "out", started=folder / "started",
                                  data=write_corpus(folder / "data")))  # fmt: skip
    return path


def test_two_processes_examine_each_other_and_a_script_and_keep_secrets(script: Path, tmp_path: Path) -> None:
    done = run(*DOCTOR, "--script", script, "--json", tmp_path / "report.json", launcher=TORCHRUN,
               HF_TOKEN="hf_secret", DATA_PATH=str(tmp_path / "nothing"))  # fmt: skip
    found = findings(tmp_path / "report.json")
    assert done.returncode != 0 and "1 problem, 0 warnings" in done.stdout, done.stdout + done.stderr[-3000:]
    assert [key for key, f in found.items() if f["level"] == "problem"] == [("run", "--data-path")]
    assert "DATA_PATH in the script" in found["run", "--data-path"]["advice"]
    assert found["links", "ranks 0 1"]["found"].endswith("GB/s")
    assert found["ranks", "versions"]["found"] == "the same on all 2 ranks"
    assert found["operators", "attention bfloat16"]["level"] == "ok"
    assert found["run", "layout"]["found"].startswith("2 processes = TP 2 x PP 1 x DP 1")
    assert "MiB needed" in found["run", "fit"]["found"]
    assert "PROBLEM" in done.stdout and "127.0.0.1" in done.stdout
    assert "hf_secret" not in done.stdout + (tmp_path / "report.json").read_text()
    assert not (script.parent / "started").exists() and not (script.parent / "out").exists()


@pytest.mark.slow
def test_one_process_with_everything_in_order_ends_with_status_0(script: Path, tmp_path: Path) -> None:
    done = run(*DOCTOR, "--script", script, "--json", tmp_path / "report.json")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert {f["level"] for f in findings(tmp_path / "report.json").values()} <= {"ok", "info", "warning"}


@pytest.mark.slow
def test_a_device_that_is_not_there_is_a_problem_and_the_rest_is_still_told() -> None:
    done = run(*DOCTOR, "--device", "npu", "--no-operators")
    assert done.returncode == 1 and "1 problem" in done.stdout, done.stdout + done.stderr[-3000:]
    assert "torch_npu" in done.stdout and "disk of the working folder" in done.stdout


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_with_its_name(tmp_path: Path) -> None:
    with Job(*DOCTOR, "--device", "cpu", log=tmp_path / "log") as job:
        job.until(lambda: "operators" in job.text or "host  " in job.text, seconds=200)
        kill(job.workers()[1], signal.SIGKILL)
        assert job.ends(within=60) != 0


@pytest.mark.slow
def test_a_simulated_npu_passes_and_a_wrong_fused_operator_is_found(tmp_path: Path) -> None:
    sound = run_on_simulated_npu("modellink_lora", ["doctor", "--json", tmp_path / "sound.json"])
    found = findings(tmp_path / "sound.json")
    assert sound.returncode == 0, sound.stdout + sound.stderr[-3000:]
    fused = {what: f["found"] for (topic, what), f in found.items() if topic == "operators"}
    assert "npu::npu_rms_norm, error" in fused["rms_norm bfloat16"], sound.stdout + sound.stderr[-3000:]
    assert "npu::npu_fusion_attention, error" in fused["attention float16"]
    assert "npu::npu_all_gather_base_mm, error" in fused["gather_matmul bfloat16"]
    assert "npu::npu_mm_reduce_scatter_base, error" in fused["matmul_scatter bfloat16"]
    assert found["links", "sum over all ranks, hccl"]["level"] == "ok"

    program = tmp_path / "wrong.py"
    program.write_text(
        "import sys, torch_npu\n"
        "right = torch_npu.npu_rms_norm\n"
        "torch_npu.npu_rms_norm = lambda x, w, epsilon: (right(x, w, epsilon=epsilon)[0] * 1.1, None)\n"
        "from modellink_lora.cli.main import main\n"
        f"sys.exit(main(['doctor', '--json', {str(tmp_path / 'wrong.json')!r}]))\n"
    )
    done = run_on_simulated_npu(program)
    found = findings(tmp_path / "wrong.json")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]  # a run leaves the operator out, and is right
    left_out = found["operators", "npu_rms_norm"]
    assert left_out["level"] == "warning" and "not used: differs from plain PyTorch by" in left_out["found"]
    assert found["operators", "rms_norm bfloat16"]["found"].startswith("plain PyTorch, error")
    assert found["operators", "swiglu bfloat16"]["level"] == "ok"


@pytest.mark.slow
def test_an_interface_that_is_not_there_is_one_line() -> None:
    done = run(*DOCTOR, "--no-operators", GLOO_SOCKET_IFNAME="ib77")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "error: GLOO_SOCKET_IFNAME=ib77: this host has no such interface; it has " in done.stderr
