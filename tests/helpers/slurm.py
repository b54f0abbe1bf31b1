"""A SLURM cluster of its own for a test: munged, slurmctld and a slurmd on each of some hosts (see hosts.py).

All daemons run inside the hosts, so they end with them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.hosts import Network, Unavailable, network

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel")
TASKS = 4  # that fit on one host at the same time
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
# jobs of the partition `urgent` push those of the other one out of their hosts, which SIGTERM announces by 30 s
_SETTINGS = """
ClusterName=test
SlurmctldHost={first}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SwitchType=switch/none
MpiDefault=none
NodeName={hosts} CPUs={tasks}
PartitionName=usual Nodes=ALL Default=YES PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


@dataclass
class Slurm:
    """The cluster, as somebody on its first host sees it."""

    network: Network
    folder: Path

    def run(self, *words: object, at: Path | None = None, **variables: object) -> str:
        """What a command prints; in the folder `at` and with these variables alone, if they are given."""
        first = (*self.network.hosts[0].enter, *((f"--chdir={at}",) if at else ()))
        command = [*first, f"SLURM_CONF={self.folder}/slurm.conf", *map(str, words)]
        environment = {name: str(value) for name, value in variables.items()} or None
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}\n{self.logs()}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def idle(self) -> int:
        """How many hosts wait for work; 0 as long as the controller does not answer."""
        try:
            return self.run("sinfo", "--Node", "--noheader", "--format=%T").splitlines().count("idle") // 2
        except AssertionError:
            return 0

    def until(self, there: Callable[[], object], *, seconds: float, job: str = "") -> None:
        """Wait for a condition; `job` must not end before."""
        limit = time.monotonic() + seconds
        while not there():
            ended = job and self.job(job)["JobState"] in ENDED and not there()
            if ended or time.monotonic() > limit:
                raise AssertionError(self.log(job) if job else self.logs())
            time.sleep(0.2)

    def log(self, job: str) -> str:
        path = Path(self.job(job)["StdOut"])
        return path.read_text(errors="replace") if path.is_file() else ""

    def logs(self) -> str:
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-1500:]}" for log in self.folder.glob("*.log"))


@contextlib.contextmanager
def cluster(count: int, folder: Path) -> Iterator[Slurm]:
    """SLURM on `count` hosts. Raises Unavailable where it cannot be."""
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        raise Unavailable(f"SLURM is not installed: no {', '.join(absent)}")
    with network(count, folder) as net, contextlib.ExitStack() as daemons:
        names = ",".join(host.name for host in net.hosts)
        settings = _SETTINGS.format(first=net.hosts[0].name, folder=folder, hosts=names, tasks=TASKS)
        (folder / "slurm.conf").write_text(settings)
        for log in ("munged", "slurmctld", *(f"slurmd.{host.name}" for host in net.hosts)):
            (folder / f"{log}.log").touch()
        slurm = Slurm(net, folder)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        first = net.hosts[0]

        def daemon(*words: str) -> None:
            with (folder / "daemons.log").open("ab") as log:
                process = subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            daemons.callback(process.wait)
            daemons.callback(process.terminate)

        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        munge = (f"--{flag}={folder}/munge.{file}" for flag, file in files.items())
        daemon(*first.enter, "munged", "--foreground", "--force", "--num-threads=4", *munge)
        try:
            slurm.until((folder / "munge.socket").exists, seconds=10)
            daemon(*first.enter, "slurmctld", "-D", "-f", f"{folder}/slurm.conf")
            for host in net.hosts:
                daemon(*host.enter, "slurmd", "-D", "-N", host.name, "-f", f"{folder}/slurm.conf")
            slurm.until(lambda: slurm.idle() == count, seconds=30)
        except AssertionError as error:
            raise Unavailable(f"SLURM does not start: {error}") from error
        yield slurm
