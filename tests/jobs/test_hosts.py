"""Training jobs on several hosts: the same numbers as on one, and an end with a reason when a host or rank is lost.

The hosts are network namespaces of this machine, with names, addresses and processes of their own.
"""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from tests.helpers.fleet import PROCESSES, PRODUCT, PROGRAM, Fleet, Source, flags, fleet, make_source, saved
from tests.helpers.hosts import Network, SlowCable, Unavailable, network
from tests.helpers.jobs import Job, kill
from tests.helpers.training import adapter_tensors, losses

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES))
TP2_PP2 = {"tensor-model-parallel-size": 2, "pipeline-model-parallel-size": 2}
TP2_DP2 = {"tensor-model-parallel-size": 2}
ENDLESS = 100000
LIMIT = 60  # seconds from the loss of a rank or host to the end of all others


@contextlib.contextmanager
def hosts(count: int, folder: Path, *, cable: SlowCable | None = None) -> Iterator[Network]:
    try:
        with network(count, folder, cable=cable) as made:
            yield made
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return make_source(tmp_path_factory.mktemp("hosts"))


@pytest.fixture(scope="module")
def straight(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, int]], Path]:
    """The save folder of a run of a layout on one host, made when it is first asked for."""
    done: dict[str, Path] = {}

    def run(layout: dict[str, int]) -> Path:
        if str(layout) not in done:
            folder = tmp_path_factory.mktemp("straight")
            words = flags(source, folder / "save", **layout)
            with Job(PROGRAM, folder, *words, log=folder / "log", launcher=TORCHRUN) as job:
                assert job.ends(within=240) == 0, job.text
            done[str(layout)] = folder / "save"
        return done[str(layout)]

    return run


def same(save: Path, expected: Path) -> None:
    """Bit by bit, losses and adapter."""
    assert losses(save) == losses(expected) and len(losses(save)) == 6
    found, wanted = adapter_tensors(save), adapter_tensors(expected)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def as_debian_leaves_them(made: Network) -> None:
    """Everybody's own name means 127.0.1.1."""
    for host in made.hosts:
        host.know({other.name: other.address for other in made.hosts} | {host.name: "127.0.1.1"})


def ends_in_time(job: Fleet) -> list[list[str]]:
    began = time.monotonic()
    statuses = job.end(within=LIMIT + 60)
    assert time.monotonic() - began < LIMIT, job.text
    assert all(statuses), job.text
    return job.errors()


def test_two_hosts_train_like_one_and_when_one_vanishes_all_processes_end_naming_it(
    source: Source, straight: Callable[[dict[str, int]], Path], tmp_path: Path
) -> None:
    save = tmp_path / "save"
    with hosts(2, tmp_path) as made:
        as_debian_leaves_them(made)
        words = flags(source, save, **TP2_PP2, **{"train-iters": ENDLESS})
        with fleet(made.hosts, words, tmp_path, environment=["PATIENCE=12"]) as job:
            job.until(lambda: saved(save) >= 2)
            made.cut(made.hosts[1])
            first, second = ends_in_time(job)
    assert first == ["error: ranks 2 3 on host node1 are gone: no sign of life for 12 s; the job ends"], job.text
    assert len(second) == 1 and second[0].startswith("error: rank 0 on host node0 or its launcher is gone"), job.text
    expected = losses(straight(TP2_PP2))[:3]
    assert losses(save)[:3] == expected[: len(losses(save))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "layout", "kind"),
    [(2, TP2_PP2, "c10d"), (4, TP2_PP2, "classic"), (2, TP2_DP2, "classic"), (4, TP2_DP2, "c10d")],
    ids=["2x2 PP across", "4x1 TP and PP across", "2x2 DP across", "4x1 TP and DP across"],
)
def test_hosts_train_like_one(
    source: Source,
    straight: Callable[[dict[str, int]], Path],
    tmp_path: Path,
    count: int,
    layout: dict[str, int],
    kind: str,
) -> None:
    with hosts(count, tmp_path) as made:
        as_debian_leaves_them(made)
        words = flags(source, tmp_path / "save", **layout)
        with fleet(made.hosts, words, tmp_path, kind=kind, program=PRODUCT) as job:
            assert job.end() == [0] * count, job.text
    same(tmp_path / "save", straight(layout))


@pytest.mark.slow
def test_hosts_that_know_no_names_but_their_own_meet_by_addresses(
    source: Source, straight: Callable[[dict[str, int]], Path], tmp_path: Path
) -> None:
    """As docs/launch.md says: PET_LOCAL_ADDR, the environment's spelling of torchrun's --local-addr."""
    with hosts(2, tmp_path) as made:
        for host in made.hosts:
            host.know({host.name: "127.0.1.1"})
        words = flags(source, tmp_path / "save", **TP2_PP2)
        with fleet(made.hosts, words, tmp_path, kind="addresses", program=PRODUCT) as job:
            assert job.end() == [0, 0], job.text
    same(tmp_path / "save", straight(TP2_PP2))


@pytest.mark.slow
def test_a_slow_link_changes_no_number_and_alarms_nobody(
    source: Source, straight: Callable[[dict[str, int]], Path], tmp_path: Path
) -> None:
    """20 ms from host to host, 10 Mbit/s."""
    with (
        hosts(2, tmp_path, cable=SlowCable(delay=0.01, rate=1e7)) as made,
        fleet(made.hosts, flags(source, tmp_path / "save", **TP2_PP2), tmp_path, program=PRODUCT) as job,
    ):
        assert job.end() == [0, 0], job.text
        assert job.errors() == [[], []]
    same(tmp_path / "save", straight(TP2_PP2))


def crash_last(made: Network) -> None:
    made.hosts[-1].crash()


def unplug_last(made: Network) -> None:
    made.hosts[-1].run("ip", "link", "set", "eth0", "down")


def cut_first(made: Network) -> None:
    made.cut(made.hosts[0])


@pytest.mark.slow
@pytest.mark.parametrize("lose", [crash_last, unplug_last, cut_first])
def test_a_lost_host_ends_the_job_within_a_minute_and_the_last_checkpoint_resumes(
    source: Source, straight: Callable[[dict[str, int]], Path], tmp_path: Path, lose: Callable[[Network], None]
) -> None:
    save = tmp_path / "save"
    with hosts(2, tmp_path) as made:
        words = flags(source, save, **TP2_DP2, **{"train-iters": ENDLESS, "save-interval": 1})
        with fleet(made.hosts, words, tmp_path, program=PRODUCT) as job:
            job.until(lambda: saved(save) >= 2)
            lose(made)
            errors = ends_in_time(job)
        if lose is cut_first:
            assert all(line.startswith("error: rank 0 on host node0 or its launcher is gone") for line in errors[1])
        else:
            assert len(errors[0]) == 1 and errors[0][0].startswith("error: ranks 2 3 on host node1 are gone"), job.text
    (tmp_path / "again").mkdir()
    with (
        hosts(2, tmp_path / "again") as made,
        fleet(made.hosts, flags(source, save, **TP2_DP2), tmp_path / "again", program=PRODUCT) as job,
    ):
        assert job.end() == [0, 0], job.text
    same(save, straight(TP2_DP2))


def ranks_of(job: Job) -> dict[int, psutil.Process]:
    """The training processes of a launcher, which is itself started by another program here."""
    found = {}
    for process in job.workers():
        with contextlib.suppress(psutil.Error):
            found[int(process.environ().get("RANK", -1))] = process
    found.pop(-1, None)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_rank_killed_at_any_moment_is_named_with_host_and_signal(source: Source, tmp_path: Path, seed: int) -> None:
    moment, save = random.Random(seed), tmp_path / "save"
    number = moment.choice([signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
    with hosts(2, tmp_path) as made:
        words = flags(source, save, **TP2_PP2, **{"train-iters": ENDLESS})
        with fleet(made.hosts, words, tmp_path, program=PRODUCT, kind=moment.choice(["classic", "c10d"])) as job:
            place = moment.randrange(2)
            job.until(lambda: len(ranks_of(job.jobs[place])) == 2)
            if moment.random() < 0.5:
                job.until(lambda: saved(save) >= 2)
            time.sleep(moment.uniform(0, 10))
            ranks = ranks_of(job.jobs[place])
            rank = moment.choice(sorted(ranks))
            kill(ranks[rank], number)
            ends_in_time(job)
    assert f"Signal {int(number)} ({number.name})" in job.jobs[place].text, "torchrun of that host knows always"
    gone = f"rank {rank} on host node{place} is gone: "
    # before the processes have met nobody knows its host; while they load libraries torchrun may be faster than they
    said = (f"{gone}ended by {number.name}", f"{gone}its launcher knows how it ended", "did not start")
    assert any(line in each.text for each in job.jobs for line in said), job.text
