"""`modellink-lora doctor`: what this machine, and the way to the others, will do to a run; what to do about it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modellink_lora.cli.ending import end
from modellink_lora.cli.flags import build_parser
from modellink_lora.cli.launch import Launch
from modellink_lora.cli.network import set_network_defaults
from modellink_lora.cli.training_command import command_of, read_command, variables_of
from modellink_lora.config.doctor import DoctorConfig
from modellink_lora.config.errors import UserError
from modellink_lora.diagnosis.finding import Finding, merged, problems

if TYPE_CHECKING:
    import torch

    from modellink_lora.device import Device
    from modellink_lora.diagnosis.ranks import Meeting, Person

_MARKS = {
    "ok": ("ok", "green"),
    "info": ("-", ""),
    "warning": ("warning", "yellow"),
    "problem": ("PROBLEM", "bold red"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Look at everything. Returns 1 if there is a problem."""
    words = list(sys.argv[1:] if argv is None else argv)
    own, command = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = build_parser(
        "modellink-lora doctor",
        "Look at this machine: devices, versions, operators, environment, room; under torchrun also at the links "
        "between the processes. With --script, or a training command after `--`, check what that run needs. Nothing "
        "is changed.",
        [DoctorConfig],
    )
    config = DoctorConfig(**parser.parse(own)[DoctorConfig])
    if config.script and command:
        parser.error("--script and a command after -- exclude each other")
    launch = Launch.from_environment()
    report = _Report(launch.is_first)
    try:
        import torch  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:  # torch loads torch_npu by itself, which may fail
        report.show([_torch_fails(error)])
        return report.ending(config.json)
    variables = {}
    if config.script and launch.is_first:
        command, variables = command_of(Path(config.script)), variables_of(Path(config.script))
    _examine(config, launch, command, variables, report)
    return report.ending(config.json)


def _examine(
    config: DoctorConfig, launch: Launch, command: list[str], variables: dict[str, str], report: _Report
) -> None:
    from modellink_lora.cli.processes import joined
    from modellink_lora.cli.signals import Stop
    from modellink_lora.diagnosis.links import limit
    from modellink_lora.diagnosis.ranks import Meeting

    kind, unavailable = _kind(config, launch)
    environment = _environment(launch, kind)
    for finding in environment:
        if finding.what == "GLOO_SOCKET_IFNAME" and finding.level == "problem":  # gloo would end with a traceback
            raise UserError(f"{finding.what}={finding.found}: {finding.advice}")
    meeting = _meet(config, launch, kind)
    if meeting:
        _tell(meeting, report)
    stop = Stop()
    minutes = max(1, round(config.timeout_seconds * 5 / 60))
    with joined(launch, device=kind, timeout_minutes=minutes, stop=stop) as (device, here):
        import torch.distributed as dist

        def ended(line: str) -> None:
            if stop.peers:
                stop.peers.end(f"error: {line}", 1)
            end(f"error: {line}", 1)

        def guard(line: str) -> Any:  # rank 0 speaks; the others do if it cannot
            return limit(config.timeout_seconds * (1 if launch.is_first else 1.5), line, ended)

        words: list[Any] = [command, variables]
        if launch.world_size > 1:
            if not meeting:
                everybody: list[Any] = [None] * launch.world_size
                dist.all_gather_object(everybody, _introduction(launch, kind))
                meeting = Meeting(everybody)
                _tell(meeting, report)
            dist.broadcast_object_list(words, src=0, device=_cpu())
        mine = [*unavailable, *_local(config, launch, device, here, words, environment, guard)]
        everyone: list[Any] = [mine]
        if meeting:
            everyone = [[]] * launch.world_size
            dist.all_gather_object(everyone, mine)
        report.show(merged(everyone, report.hosts))
        if meeting:
            _links(device, here, meeting, guard, report)
        report.agree()


def _kind(config: DoctorConfig, launch: Launch) -> tuple[str, list[Finding]]:
    """The kind of device to look at, and what is to be said when the wanted one is not there."""
    from modellink_lora.device import get_device

    wanted = config.device if config.device != "auto" else launch.device
    try:
        return get_device(wanted).name, []
    except UserError as error:
        return get_device("auto").name, [Finding("device", wanted, str(error), "problem", "as it says")]


def _environment(launch: Launch, kind: str) -> list[Finding]:
    """Before defaults are set (cli/launch.py): as the user left it."""
    import psutil

    from modellink_lora.diagnosis.environment import environment_findings

    return environment_findings(
        os.environ, device=kind, processes=launch.local_world_size, cores=len(os.sched_getaffinity(0)),
        interfaces=psutil.net_if_addrs(),
    )  # fmt: skip


def _local(
    config: DoctorConfig, launch: Launch, device: Device, here: torch.device, words: Sequence[Any],
    environment: Sequence[Finding], guard: Callable[[str], Any],
) -> list[Finding]:  # fmt: skip
    """What this process finds by itself, except that products joined with collectives need all."""
    from modellink_lora.device import facts
    from modellink_lora.diagnosis import operators
    from modellink_lora.diagnosis.fit import Here, fit_findings
    from modellink_lora.diagnosis.host import folders_of, host_findings, lock_findings, memory_findings
    from modellink_lora.diagnosis.versions import device_findings, version_findings

    run, wrong = None, []
    if words[0]:
        try:
            run = read_command(words[0], devices=facts.count(device.name), variables=words[1])
        except UserError as error:
            wrong.append(Finding("run", "command", str(error), "problem", "mend the script, or its arguments"))
    given = config.save or (run.saves_to if run else None)
    save = Path(given) if given else None
    local = launch.world_size == 1
    indices = range(facts.count(device.name)) if local else [launch.local_rank if device.name != "cpu" else 0]
    found = [
        *device_findings(device.name),
        *memory_findings(device.name, indices),
        *version_findings(device.name),
        *environment,
        *host_findings(folders_of(save), several_hosts=launch.local_world_size < launch.world_size),
        *(lock_findings(save) if save and launch.is_first else ()),
    ]  # fmt: skip
    if config.operators:
        with guard("the device's operators do not end: set --no-operators to see the rest"):
            found += operators.operator_findings(device, here, operators.world_group())
    if run:
        free = min(facts.memory(device.name, index)[0] for index in indices)
        found += fit_findings(run, Here(device.name, facts.count(device.name), free))
    return [*found, *wrong]


def _meet(config: DoctorConfig, launch: Launch, kind: str) -> Meeting | None:
    """Find the other processes at torchrun's store. Raises UserError naming who is missing or out of reach.

    Without torchrun rank 0 will hold the store, once, for the process group: the processes then meet only there.
    """
    from modellink_lora.diagnosis.ranks import meet

    if launch.world_size == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return meet(
        address=launch.master_address, port=launch.master_port, rank=launch.rank, world_size=launch.world_size,
        me=_introduction(launch, kind), seconds=config.timeout_seconds,
    )  # fmt: skip


def _introduction(launch: Launch, kind: str) -> Person:
    from modellink_lora.diagnosis.host import address_of
    from modellink_lora.diagnosis.ranks import Person
    from modellink_lora.diagnosis.versions import versions

    set_network_defaults(launch)
    address = address_of(os.environ.get("GLOO_SOCKET_IFNAME"))
    return Person(os.uname().nodename, address, {"device": kind, **versions(kind)})


def _tell(meeting: Meeting, report: _Report) -> None:
    """Who the ranks are, and in what they differ."""
    from modellink_lora.diagnosis.ranks import difference_findings

    report.hosts = meeting.hosts
    report.show_ranks(meeting)
    report.show(difference_findings(meeting.facts, meeting.hosts))
    if len({one["device"] for one in meeting.facts}) > 1:
        raise UserError("the ranks are on different kinds of devices, see the table: they cannot join; give --device")


def _links(device: Device, here: torch.device, meeting: Meeting, guard: Callable[[str], Any], report: _Report) -> None:
    import torch.distributed as dist

    from modellink_lora.diagnosis.links import link_findings, measure_all_reduce, measure_pairs
    from modellink_lora.diagnosis.ranks import clock_finding

    links = measure_pairs(device, here, meeting.hosts, guard)
    reduced = measure_all_reduce(device, here, guard)
    clocks: list[Any] = [None] * len(meeting.hosts)
    dist.barrier()
    dist.all_gather_object(clocks, time.time())
    report.show([clock_finding(clocks, meeting.hosts), *link_findings(links, meeting.hosts, reduced, device.backend)])


def _cpu() -> torch.device:
    import torch

    return torch.device("cpu")


def _torch_fails(error: BaseException) -> Finding:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    npu = "torch_npu" in str(error) or "libhccl" in str(error) or "libascend" in str(error)
    advice = (
        "source CANN's set_env.sh before Python; without an NPU set TORCH_DEVICE_BACKEND_AUTOLOAD=0 or uninstall "
        "torch-npu"
        if npu else "install torch again for this machine"
    )  # fmt: skip
    return Finding("device", "torch", f"does not load: {line}", "problem", advice)


class _Report:
    """Tables on standard output of the first process, and the same as JSON."""

    def __init__(self, speaks: bool) -> None:
        self.speaks = speaks
        self.findings: list[Finding] = []
        self.hosts = [os.uname().nodename]

    def show(self, findings: Sequence[Finding]) -> None:
        """One table a topic."""
        self.findings += findings
        if not self.speaks:
            return
        for topic in dict.fromkeys(finding.topic for finding in findings):
            _print_table(topic, [finding for finding in findings if finding.topic == topic])

    def show_ranks(self, meeting: Meeting) -> None:
        if self.speaks:
            from modellink_lora.reporting.report import print_table

            rows = [
                (str(rank), person.host, person.address, person.facts["device"], person.facts["torch"])
                for rank, person in enumerate(meeting.people)
            ]
            print_table("ranks", rows, ("rank", "host", "address", "device", "torch"))

    def agree(self) -> None:
        """Have all processes end alike."""
        import torch.distributed as dist

        shared: list[Any] = [self.findings]
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(shared, src=0, device=_cpu())
        self.findings = shared[0]

    def ending(self, path: str | None) -> int:
        """The last line, the file, the exit status."""
        wrong = problems(self.findings)
        if self.speaks:
            warnings = sum(finding.level == "warning" for finding in self.findings)
            print(
                f"{len(wrong)} problem{'s' * (len(wrong) != 1)}, {warnings} warning{'s' * (warnings != 1)}", flush=True
            )
            if path:
                from modellink_lora.checkpoint.store import replacing_file
                from modellink_lora.config.document import to_json

                found = {
                    "findings": [finding.as_json() for finding in self.findings], "hosts": self.hosts,
                    "problems": len(wrong), "warnings": warnings,
                }  # fmt: skip
                with replacing_file(Path(path)) as temporary:
                    temporary.write_text(to_json(found, indent=2) + "\n")
        return 1 if wrong else 0


def _print_table(topic: str, findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=topic, title_justify="left", show_header=False)
    for _ in range(4 if any(finding.advice for finding in findings) else 3):
        table.add_column(overflow="fold")
    for finding in findings:
        mark, style = _MARKS[finding.level]
        cells = [Text(mark, style=style), Text(finding.what), Text(finding.found), Text(finding.advice)]
        table.add_row(*cells[: len(table.columns)])
    Console(width=None if sys.stdout.isatty() else 140).print(table)
