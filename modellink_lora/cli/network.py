"""Which network interface this host shares with the others of its job."""

from __future__ import annotations

import os
import socket
from typing import Any

import psutil

from modellink_lora.cli.launch import Launch
from modellink_lora.config.errors import UserError

GLOO = "GLOO_SOCKET_IFNAME"
_ANYWHERE = "192.0.2.1"  # an address that belongs to nobody: the way there is the default route


def set_network_defaults(launch: Launch) -> None:
    """Have gloo use the interface that leads to the first host, if there are several hosts and the user does not say.

    By itself gloo takes the address that the host's own name stands for. On many machines that is 127.0.1.1, which the
    other hosts then look for on themselves.
    """
    if launch.world_size > launch.local_world_size and not os.environ.get(GLOO):
        os.environ[GLOO] = interface_toward(launch.master_address)


def interface_toward(address: str) -> str:
    """The interface through which this host talks to `address`; of the first host itself, the one others come by."""
    try:
        family, _, _, _, place = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR={address}: {error}: this host cannot resolve the name; give the first host's IP address"
        ) from None
    interfaces = {
        name: {
            entry.address.partition("%")[0] for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)
        }
        for name, entries in psutil.net_if_addrs().items()
    }
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    outward = {
        name for name in up if any(not at.startswith(("127.", "::1", "fe80:")) for at in interfaces.get(name, ()))
    }
    # the first host may know itself by a loopback address only: what its name stands for, or where it leads outside
    for each in ((family, place), *_own_places(), (socket.AF_INET, (_ANYWHERE, 9))):
        source = _source(*each)
        for name in outward:
            if source in interfaces[name]:
                return name
    if len(outward) == 1:  # no default route: what is there is what the others come by
        return outward.pop()
    raise UserError(
        f"{address} is this host itself, and which of its interfaces leads to the other hosts is unknown "
        f"({', '.join(sorted(outward)) or 'none is up'}): set {GLOO}, or give MASTER_ADDR as an IP address"
    )


def _own_places() -> list[tuple[int, Any]]:
    try:
        return [(entry[0], entry[4]) for entry in socket.getaddrinfo(socket.gethostname(), 9, type=socket.SOCK_DGRAM)]
    except OSError:
        return []


def _source(family: int, place: Any) -> str:
    """The address that packets to `place` come from; empty if there is no way there. Sends nothing."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(place)
        except OSError:
            return ""
        return str(probe.getsockname()[0])
