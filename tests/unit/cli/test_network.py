"""Which interface leads to the other hosts, on a host of its own whose names and cards are known."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from modellink_lora.cli.launch import Launch
from modellink_lora.cli.network import interface_toward
from modellink_lora.cli.processes import not_met
from modellink_lora.config.errors import UserError
from tests.helpers.hosts import Host, Unavailable, network

ASK = "import sys; from modellink_lora.cli.network import interface_toward; print(*map(interface_toward, sys.argv[1:]))"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """The first of two, with a second card besides eth0, and Debian's entry for its own name."""
    try:
        with network(2, tmp_path_factory.mktemp("hosts")) as made:
            first, second = made.hosts
            for words in (
                "link add fast type veth peer name other",
                "address add 10.78.0.1/24 dev fast",
                "link set fast up",
                "link set other up",
            ):
                first.run("ip", *words.split())
            first.know({first.name: "127.0.1.1", second.name: second.address})
            yield first
    except Unavailable as reason:
        pytest.skip(str(reason))


def asked(host: Host, *addresses: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*host.enter, sys.executable, "-c", ASK, *addresses], capture_output=True, text=True)


def test_the_interface_is_the_one_on_the_way_and_loopback_never(host: Host) -> None:
    done = asked(host, "node1", "10.77.0.1", "10.78.0.9", "10.78.0.1")
    assert done.stdout.split() == ["eth0", "eth0", "fast", "fast"], done.stderr
    unknown = asked(host, "node0")
    assert "node0 is this host itself" in unknown.stderr and "(eth0, fast): set GLOO_SOCKET_IFNAME" in unknown.stderr
    host.run("ip", "route", "add", "default", "via", "10.77.0.2")
    assert asked(host, "node0").stdout.split() == ["eth0"], "the default route decides"


def test_a_name_that_nobody_knows_is_a_line() -> None:
    with pytest.raises(UserError, match=r"MASTER_ADDR=no\.such\.host\.invalid: .*give the first host's IP address"):
        interface_toward("no.such.host.invalid")


def test_what_keeps_processes_apart_is_told_in_the_users_words() -> None:
    launch = Launch(rank=2, world_size=4, local_world_size=2, master_address="node0", master_port=29500)
    gloo = not_met(RuntimeError("Gloo connectFullMesh failed with\n[pair.cc] timed out connecting"), launch)
    assert "rank 2 does not reach the others over GLOO_SOCKET_IFNAME=" in str(gloo)
    store = not_met(dist.DistNetworkError("the client socket has timed out"), launch)
    assert "rank 2 does not meet the others at MASTER_ADDR=node0 MASTER_PORT=29500" in str(store)
    assert not_met(RuntimeError("out of memory"), launch) is None
    assert not_met(RuntimeError("gloo"), Launch(world_size=2, local_world_size=2)) is None
