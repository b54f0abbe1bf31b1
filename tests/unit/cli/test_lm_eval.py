"""What the lm-eval job refuses before any model is read."""

from __future__ import annotations

import sys

import pytest

from modellink_lora.cli.lm_eval import main
from modellink_lora.cli.main import main as command
from modellink_lora.config.errors import UserError

REFUSED = {
    "nothing for it to do": (["--load", "x"], "write its arguments after --"),
    "another model": (["--", "--model", "hf", "--tasks", "t"], "--model hf: this job gives lm-eval its own model"),
    "arguments of a model": (["--", "--model_args", "pretrained=x", "--tasks", "t"], "--model_args pretrained=..: the"),
    "a job without a model": (["--", "ls", "tasks"], "lm-eval ls needs no model"),
    "a template of ours": (["--prompt-type", "chatml", "--", "--tasks", "t"], "--apply_chat_template"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_one_line_says_what_to_do(what: str) -> None:
    words, message = REFUSED[what]
    with pytest.raises(UserError, match=message):
        main(words)


def test_a_flag_of_lm_evals_that_it_does_not_know_is_its_own_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--", "--tasks", "t", "--nonsense", "1"])
    assert "--nonsense" in capsys.readouterr().err


def test_without_lm_eval_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert command(["lm-eval", "--load", "x", "--", "--tasks", "t"]) == 1
    assert capsys.readouterr().err == "error: lm-eval is not installed: pip install 'modellink_lora[eval]'\n"
