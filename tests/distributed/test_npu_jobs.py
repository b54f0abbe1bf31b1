"""What a simulated NPU answers, and how the NPU device lives with libraries that change torch for everybody."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.answering import made_pair
from tests.helpers.npu import REPOSITORY, run_on_simulated_npu, simulator_environment, skip_without_simulator

# What MindSpeed's adaptor is documented to do to a process when it is imported, as far as it could hurt us: it reads
# and keeps the program's flags, wraps methods of every tensor, and puts modules of its own in the place of others.
ADAPTOR = """
import sys, types
import torch, torch_npu
assert not any(name.startswith("megatron.core") for name in sys.modules), "megatron-core was imported before"
assert sys.argv[1:] == [], sys.argv
from torch_npu.contrib import transfer_to_npu
for name in ("apex", "amp_C", "flash_attn"):  # and Transformer Engine, with many names, which megatron-core would use
    sys.modules[name] = types.ModuleType(name)
view, kind = torch.Tensor.view, torch.Tensor.type
torch.Tensor.view = lambda self, *size: view(self if self.is_contiguous() else self.contiguous(), *size)
torch.Tensor.type = lambda self, *args, **kwargs: (
    kind(self, *args, **kwargs) if args or kwargs else kind(self).replace("npu", "cuda"))
"""


def test_two_simulated_npus_answer_what_one_cpu_answers(tmp_path: Path) -> None:
    skip_without_simulator()
    base, adapter = made_pair(tmp_path)
    words = ["--load", base, "--lora-load", adapter, "--task", "greedy", "beam_search", "--max-new-tokens", 8,
             "--prompt", "The sum", "Red, yellow and a longer one", "--output"]  # fmt: skip
    on_cpu = [sys.executable, "inference.py", *map(str, words), str(tmp_path / "cpu.jsonl"), "--device", "cpu"]
    done = subprocess.run(on_cpu, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    on_npu = run_on_simulated_npu(
        "inference.py", [*words, tmp_path / "npu.jsonl", "--device", "npu", "--tensor-model-parallel-size", 2]
    )
    assert on_npu.returncode == 0, on_npu.stdout[-2000:] + on_npu.stderr[-4000:]
    assert (tmp_path / "npu.jsonl").read_text() == (tmp_path / "cpu.jsonl").read_text()


def test_mindspeed_is_imported_first_with_a_clean_command_line_and_redirects_instead_of_us(tmp_path: Path) -> None:
    (tmp_path / "mindspeed").mkdir()
    (tmp_path / "mindspeed" / "__init__.py").touch()
    (tmp_path / "mindspeed" / "megatron_adaptor.py").write_text(ADAPTOR)
    said = joined("--lora-r 4", tmp_path, MODELLINK_MINDSPEED="1", PYTHONPATH=str(tmp_path))
    assert "MindSpeed; fused operators: npu_rms_norm" in said, said
    assert "argv ['--lora-r', '4']" in said and "redirected False" in said, said


def test_mindspeed_that_does_not_load_is_one_line(tmp_path: Path) -> None:
    said = joined("", tmp_path, MODELLINK_MINDSPEED="1")
    assert "error: MODELLINK_MINDSPEED=1: mindspeed.megatron_adaptor does not load (ModuleNotFoundError" in said


@pytest.mark.skipif(find_spec("mindspeed") is None, reason="MindSpeed is not installed; no package registry has it")
def test_a_real_mindspeed_is_imported_too(tmp_path: Path) -> None:
    said = joined("--lora-r 4", tmp_path, MODELLINK_MINDSPEED="1")
    assert "MindSpeed; fused operators: npu_rms_norm" in said, said
    assert "argv ['--lora-r', '4']" in said and "redirected False" in said, said


def joined(flags: str, folder: Path, **env: str) -> str:
    """What a job says that joins its process group on one simulated NPU."""
    skip_without_simulator()
    script = folder / "job.py"
    script.write_text(
        "import sys, torch, torch_npu\n"
        "from tests.npu_sim import simulator\n"
        "simulator.install()\n"
        "from modellink_lora.cli.launch import Launch\n"
        "from modellink_lora.cli.main import run\n"
        "from modellink_lora.cli.processes import joined\n"
        "def job():\n"
        "    with joined(Launch.from_environment(), device='npu', timeout_minutes=1) as (device, here):\n"
        "        import megatron.core.optimizer as optimizer\n"
        "        print(device.describe())\n"
        "        print('argv', sys.argv[1:], 'redirected', optimizer.torch is not torch)\n"
        "        torch.distributed.broadcast(torch.ones(2, device=here), 0)\n"
        "sys.exit(run(job))\n"
    )
    environment = simulator_environment()
    environment |= {name: value for name, value in env.items() if name != "PYTHONPATH"}
    environment["PYTHONPATH"] += ":" + env.get("PYTHONPATH", "")
    done = subprocess.run(
        [sys.executable, script, *flags.split()], cwd=REPOSITORY, env=environment, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    return done.stdout + done.stderr
