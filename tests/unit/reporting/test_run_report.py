"""The report of a run: complete, self-contained, made again from the folder, written however the run ends."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from modellink_lora.cli.main import main
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.train import TrainConfig
from modellink_lora.reporting.charts import MOST_POINTS, smoothed, thinned, ticks
from modellink_lora.reporting.report import Reporter
from modellink_lora.reporting.run_record import flags_of
from modellink_lora.reporting.run_report import Report, read_metrics, write_reports
from modellink_lora.reporting.time_split import PARTS, Window


def facts(**changes: Any) -> dict[str, Any]:
    train = TrainConfig(lr=5e-5, train_iters=40, bf16=True, save="./out")
    return {
        "command": "torchrun --nproc-per-node 2 posttrain_gpt.py --bf16", "folder": "/home/me",
        "processes": [{"host": f"node{rank}", "tp": 0, "pp": rank, "dp": 0} for rank in range(2)],
        "layout": {"tp": 1, "pp": 2, "dp": 1}, "device": {"name": "cuda", "describe": "NVIDIA H200"},
        "versions": {"modellink_lora": "0.1.0", "torch": "2.13.0"},
        "summary": [["model", "llama <b>, 2 layers"], ["device", "NVIDIA H200"]],
        "adapters": {"header": ["module", "parameters"], "rows": [["linear_qkv", "1,024"]]},
        "flags": [flags_of(train), flags_of(LoraConfig())], "memory": {"weights": 2**20, "adapters": 2**21},
        "notes": ["note: 3 rows of padding in the vocabulary"], **changes,
    }  # fmt: skip


def reporter(folder: Path, *, start: int = 0) -> Reporter:
    return Reporter(speaks=True, folder=folder, tensorboard=None, start=start, total=40, facts=facts())


def steps(report: Reporter, first: int, last: int) -> None:
    for iteration in range(first, last + 1):
        report.record(iteration, {"lm loss": 4.0 / iteration, "grad norm": 0.5, "learning rate": 1e-4})
        if iteration % 10 == 0:
            report.record(iteration, {"validation loss": 1.0 + abs(iteration - 20) / 100})
            ranks = [{**dict.fromkeys(PARTS, 0.01 * (stage + 1)), "memory": (stage + 3) * 2**30} for stage in (0, 1)]
            window = Window(steps=10, seconds=2.0, tokens=800.0, trained_tokens=500.0, flops=4e12, devices=2,
                            peak_flops=1e14, ranks=ranks)  # fmt: skip
            report.performance(iteration, window)


def finished(folder: Path) -> tuple[str, str]:
    with reporter(folder) as report:
        steps(report, 1, 40)
        report.say("warning: the disk is nearly full")
    assert report.report == folder / "report.html"
    return (folder / "report.html").read_text(), (folder / "report.md").read_text()


def test_both_reports_tell_what_was_run_how_it_went_and_what_it_took(tmp_path: Path) -> None:
    html, markdown = finished(tmp_path)
    for text in (
        "completed", "4.0000 → 0.1000", "1.0000 at iteration 20", "node1", "4.00 GB", "400", "250", "1.0%",
        "linear_qkv", "--lr-decay-style", "5e-05", "NVIDIA H200", "2.13.0", "torchrun --nproc-per-node 2",
        "note: 3 rows of padding", "after iteration 40: warning: the disk is nearly full", "measured step",
        "together", "3.0",
    ):  # fmt: skip
        assert text in html, text
        assert text in markdown, text
    assert "| **--bf16** | yes | no |" in markdown, "what differs from its default stands out"
    assert "| --fp16 | no | no |" in markdown
    assert html.count("<svg") == 6, "loss, learning rate, gradient norm, throughput, bars and columns of the time split"
    assert "stage 1" in html


def test_the_html_is_well_formed_and_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    html, _ = finished(tmp_path)
    assert not re.search(r"https?://|<script|<link|@import|url\(|src=", html)
    assert "llama &lt;b&gt;" in html, "text of the run is text"
    xml = re.sub(r"<(meta[^>]*)>", r"<\1/>", html.replace("<!doctype html>", ""))
    ElementTree.fromstring(xml)


def test_the_report_is_made_again_from_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = finished(tmp_path)
    for name in ("report.html", "report.md"):
        (tmp_path / name).unlink()
    assert main(["report", str(tmp_path)]) == 0
    assert ((tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()) == before
    assert str(tmp_path / "report.html") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("loss is not finite"), "failed: loss is not finite"),
        (KeyboardInterrupt(), "stopped by Ctrl-C"),
        (AssertionError(), "failed: AssertionError"),
    ],
)
def test_a_run_that_fails_writes_its_report_as_far_as_it_came(
    tmp_path: Path, error: BaseException, status: str
) -> None:
    with pytest.raises(type(error)), reporter(tmp_path) as report:
        steps(report, 1, 12)
        raise error
    html = (tmp_path / "report.html").read_text()
    assert status in html and "4.0000 → 0.3333" in html


def test_an_error_of_the_report_does_not_hide_the_error_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="the reason"), reporter(tmp_path / "save") as report:
        steps(report, 1, 2)
        (tmp_path / "save" / "report.html").mkdir()
        raise UserError("the reason")
    assert "the report could not be written" in capsys.readouterr().err


def test_a_run_stopped_on_purpose_says_so(tmp_path: Path) -> None:
    with reporter(tmp_path) as report:
        steps(report, 1, 2)
        report.ending = "stopped by SIGTERM"
    assert "stopped by SIGTERM" in (tmp_path / "report.md").read_text()


def test_a_killed_run_has_a_report_and_a_resumed_one_tells_of_both_sessions(tmp_path: Path) -> None:
    killed = reporter(tmp_path)
    steps(killed, 1, 20)
    killed.bar.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 21, "lm lo')  # killed while it wrote
    write_reports(tmp_path)
    assert "running, or killed" in (tmp_path / "report.md").read_text()
    with reporter(tmp_path, start=20) as resumed:
        steps(resumed, 21, 40)
    markdown = (tmp_path / "report.md").read_text()
    assert "ended without a word" in markdown and "| 20 | completed |" in markdown
    assert "4.0000 → 0.1000" in markdown
    assert len(Report.read(tmp_path).series("lm loss")) == 40
    with reporter(tmp_path) as fresh:
        steps(fresh, 1, 2)
    assert "ended without a word" not in (tmp_path / "report.md").read_text(), "a run from 0 is another run"


def test_only_the_last_line_of_the_metrics_may_be_unfinished(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n{"iter')
    assert read_metrics(path) == [{"iteration": 1}]
    path.write_text('{"iter\n{"iteration": 1}\n')
    with pytest.raises(ValueError):
        read_metrics(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no run.json"), ("{}", "is not the record"), ("[", "not valid JSON"),
        ('{"format": 99, "sessions": []}', "newer version"),
    ],
)  # fmt: skip
def test_a_folder_without_a_run_is_one_line(
    tmp_path: Path, content: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    assert main(["report", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_run_without_measurements_or_steps_still_has_a_report(tmp_path: Path) -> None:
    with reporter(tmp_path):
        pass
    assert "completed" in (tmp_path / "report.md").read_text()
    with reporter(tmp_path) as report:
        report.record(1, {"lm loss": float("nan"), "grad norm": None})
        report.record(2, {"lm loss": 2.0, "grad norm": float("inf")})
    assert "2.0000 → 2.0000" in (tmp_path / "report.html").read_text(), "what is no number is not drawn"


def test_warnings_of_the_package_reach_the_report(tmp_path: Path) -> None:
    import logging

    with reporter(tmp_path) as report:
        steps(report, 1, 3)
        logging.getLogger("modellink_lora.device.fused_npu").warning("%s is replaced", "npu_rms_norm")
    assert json.loads((tmp_path / "run.json").read_text())["notes"][-1] == (
        "after iteration 3: warning: npu_rms_norm is replaced"
    )


def test_flags_are_shown_as_they_are_typed() -> None:
    rows = {flag: (value, default) for flag, value, default in flags_of(TrainConfig(lr=1e-4, train_iters=3))["rows"]}
    assert rows["--lr"] == (1e-4, 0.0)
    assert rows["--no-check-for-nan-in-loss-and-grad"] == (False, False), "a switch that stores False was not given"


def test_long_lines_are_thinned_and_smoothed_without_a_shift() -> None:
    line = [(float(x), 2.0 * x) for x in range(1, 10001)]
    thin = thinned(line)
    assert len(thin) <= MOST_POINTS and thin[-1][0] == 10000
    assert smoothed(line)[5000] == (5001.0, pytest.approx(10002))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.93, 2.51), (1e-7, 5e-5), (-3, 1e6), (999, 1000)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 8
    assert all(low - 1e-9 <= value <= high * (1 + 1e-9) + 1e-9 for value in found)
