"""The console command: what it lists, and the exit status and line of each way to fail."""

from __future__ import annotations

import pytest

from modellink_lora import __version__
from modellink_lora.cli.main import JOBS, main, run
from modellink_lora.config.errors import UserError


def fail_for_user() -> None:
    raise UserError("--load x: no such folder\n  give one that exists")


def interrupt() -> None:
    raise KeyboardInterrupt


def test_without_arguments_the_jobs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(f"  {job} " in text for job in JOBS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0 and capsys.readouterr().out.strip() == f"modellink_lora {__version__}"


def test_an_unknown_job_is_status_2_with_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cook"]) == 2
    assert capsys.readouterr().err == f"modellink-lora: error: no job 'cook'; choose {', '.join(JOBS)}\n"


@pytest.mark.parametrize(("rank", "prefix"), [(None, ""), ("0", ""), ("3", "[rank 3] ")])
def test_a_user_error_is_one_line_and_a_later_rank_gives_the_launcher_time_to_stop_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rank: str | None, prefix: str
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("modellink_lora.cli.main.time.sleep", waited.append)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert run(fail_for_user) == 1
    assert capsys.readouterr().err == f"{prefix}error: --load x: no such folder give one that exists\n"
    assert waited == ([10.0] if prefix else [])


def test_interrupting_is_status_130_and_success_0() -> None:
    assert run(interrupt) == 130 and run(lambda: None) == 0 and run(lambda: 4) == 4


def test_our_own_mistakes_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 // 0)
