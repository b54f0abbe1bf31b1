"""The sbatch scripts of examples/slurm on a real SLURM of two hosts: preempted, requeued, and the same at the end."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.helpers.fleet import saved
from tests.helpers.hosts import Unavailable
from tests.helpers.scripts import environment
from tests.helpers.slurm import ENDED, Slurm, cluster
from tests.helpers.story import enter_repository
from tests.helpers.tiny import tiny_model
from tests.helpers.training import adapter_tensors, hf_to_megatron, losses, write_corpus

TUNE = "examples/mcore/llama2/tune_llama2_7b_lora_ptd.sh"
CONVERT = "examples/mcore/llama2/ckpt_convert_llama2_hf2mcore.sh"
STEPS = 40


@dataclass(frozen=True)
class Site:
    """A cluster, and a checkout on its shared file system with a model and data."""

    slurm: Slurm
    folder: Path

    def variables(self, save: str, **more: object) -> dict[str, object]:
        return {
            "TUNE": TUNE, "CKPT_LOAD_DIR": "base", "CKPT_SAVE_DIR": save, "DATA_PATH": "data", "TOKENIZER_MODEL": "hf",
            "GPUS_PER_NODE": 1, "MODELLINK_DEVICE": "cpu", **more,
        }  # fmt: skip

    def submit(self, script: str, *words: object, sbatch: tuple[object, ...] = (), **variables: object) -> str:
        command = ("sbatch", "--parsable", *sbatch, f"examples/slurm/{script}", *words)
        return self.slurm.run(*command, at=self.folder, **environment(**variables))

    def ends(self, job: str, *, well: bool = True) -> str:
        """Wait for a job; its log."""
        self.slurm.until(lambda: self.slurm.job(job)["JobState"] in ENDED, seconds=240)
        log = self.slurm.log(job)
        assert (self.slurm.job(job)["JobState"] == "COMPLETED") is well, f"{log}\n{self.slurm.logs()}"
        return log

    def requeued(self, job: str) -> None:
        """Wait until it is, and spare it most of the two minutes for which SLURM then holds a job back.

        Within a second or two the hosts still refuse to start what they have just been told to end.
        """
        waits = {"Restarts": "1", "JobState": "PENDING"}
        self.slurm.until(lambda: waits.items() <= self.slurm.job(job).items(), seconds=60)
        self.slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now+5")


FLAGS = (
    *("--train-iters", STEPS, "--seq-length", 32, "--micro-batch-size", 1, "--global-batch-size", 4, "--lr", "5e-3"),
    *("--prompt-type", "alpaca", "--save-interval", 1000, "--lora-r", 4, "--lora-alpha", 8, "--log-interval", 1),
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("slurm")
    try:
        with cluster(2, root) as slurm:
            folder = enter_repository(tmp_path_factory.mktemp("checkout"))
            hf_to_megatron(tiny_model("llama", folder / "hf", tokenizer=True), folder / "base")
            write_corpus(folder / "data", tokenizer=str(folder / "hf"))
            yield Site(slurm, folder)
    except Unavailable as reason:
        pytest.skip(str(reason))


def straight(site: Site, save: str, *words: object, **variables: object) -> Path:
    """The same script without SLURM, on one host, in one go."""
    settings = environment(**site.variables(save, **variables))
    command = ["bash", TUNE, *map(str, (*FLAGS, *words))]
    done = subprocess.run(command, cwd=site.folder, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return site.folder / save


def same(save: Path, expected: Path) -> None:
    """Bit by bit, losses and adapter."""
    assert losses(save) == losses(expected) and len(losses(save)) == STEPS
    found, wanted = adapter_tensors(save), adapter_tensors(expected)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def steps_of(save: Path) -> int:
    return len(losses(save)) if (save / "metrics.jsonl").is_file() else 0


def test_a_preempted_job_saves_requeues_itself_and_ends_like_one_that_was_not(site: Site) -> None:
    save = site.folder / "preempted"
    job = site.submit("tune_torchrun.sh", *FLAGS, **site.variables(save.name, TP=2))
    site.slurm.until(lambda: steps_of(save) >= 3, seconds=240, job=job)
    urgent = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null")
    site.ends(site.slurm.run("sbatch", "--parsable", *urgent, "--wrap=sleep 1"))
    assert 3 <= saved(save) < STEPS, site.slurm.log(job)
    site.requeued(job)
    text = site.ends(job)
    assert "SIGTERM: the job saves after this step and ends" in text and "back into the queue" in text
    assert not re.search("^(rank .*)?error:", text, re.MULTILINE), text
    same(save, straight(site, "straight", TP=2, GPUS_PER_NODE=2))


@pytest.mark.slow
def test_bad_input_is_not_put_back_into_the_queue(site: Site) -> None:
    job = site.submit("tune_torchrun.sh", *FLAGS, "--lora-r", 0, **site.variables("bad", TP=2))
    assert "--lora-r" in site.ends(job, well=False)
    assert site.slurm.job(job)["Restarts"] == "0"


@pytest.mark.slow
def test_one_task_a_rank_without_torchrun_is_stopped_and_goes_on_like_one_host(site: Site) -> None:
    save, layout = site.folder / "ranks", {"TP": 2, "PP": 2}
    job = site.submit("tune_srun.sh", *FLAGS, sbatch=("--ntasks-per-node=2",), **site.variables(save.name, **layout))
    site.slurm.until(lambda: steps_of(save) >= 3, seconds=240, job=job)
    site.slurm.run("scancel", "--signal=TERM", job)
    site.requeued(job)
    text = site.ends(job)
    assert "stopping after iteration" in text and "torchrun" not in text
    same(save, straight(site, "ranks-straight", **layout, GPUS_PER_NODE=4))


@pytest.mark.slow
def test_a_killed_task_ends_the_job_which_is_not_requeued_and_slurm_names_the_signal(site: Site) -> None:
    save = site.folder / "killed"
    job = site.submit("tune_srun.sh", *FLAGS, sbatch=("--ntasks-per-node=2",), **site.variables(save.name, TP=2))
    site.slurm.until(lambda: steps_of(save) >= 3, seconds=240, job=job)
    second = site.slurm.network.hosts[1]
    second.run("bash", "-c", "grep -lz ^RANK=3 /proc/[0-9]*/environ | grep -o '[0-9]*' | xargs -n1 kill -9 || true")
    began = time.monotonic()
    text = site.ends(job, well=False)
    assert time.monotonic() - began < 60
    assert re.search(r"srun: error: node1: task 3: (Killed|Exited with exit code 137)", text), text
    assert site.slurm.job(job)["Restarts"] == "0"


@pytest.mark.slow
def test_a_cancelled_job_is_not_put_back(site: Site) -> None:
    save = site.folder / "cancelled"
    job = site.submit("tune_torchrun.sh", *FLAGS, "--train-iters", 10000, **site.variables(save.name, TP=2))
    site.slurm.until(lambda: steps_of(save) >= 3, seconds=240, job=job)
    site.slurm.run("scancel", job)
    text = site.ends(job, well=False)
    site.slurm.until(lambda: not site.slurm.run("squeue", "--noheader"), seconds=60)
    assert site.slurm.job(job)["Restarts"] == "0" and "back into the queue" not in text


@pytest.mark.slow
def test_a_conversion_is_a_job_that_a_sweep_can_wait_for(site: Site) -> None:
    first = site.submit("convert.sh", HF_PATH="hf", CKPT_SAVE_DIR="converted", CONVERT=CONVERT)
    settings = site.variables("unused", CKPT_LOAD_DIR="converted", SWEEP_DIR="sweep", RATES="1e-3 5e-3", RANKS="4")
    after = ("--array=0-2", f"--dependency=afterok:{first}")
    array = site.submit("sweep.sh", *FLAGS[2:], "--train-iters", 2, sbatch=after, **settings)
    assert "error" not in site.ends(first)
    site.slurm.until(lambda: not site.slurm.run("squeue", "--noheader"), seconds=240)
    logs = {number: (site.folder / f"sweep-{array}-{number}.log").read_text() for number in range(3)}
    assert "element 2 is beyond the grid of 2 rates and 1 ranks" in logs[2]
    runs = {rate: site.folder / f"sweep/lr-{rate}-r-4" for rate in ("1e-3", "5e-3")}
    assert all(saved(run) == 2 for run in runs.values()), logs
    adapters = [adapter_tensors(run) for run in runs.values()]
    assert any(not torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
