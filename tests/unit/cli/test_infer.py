"""What inference.py says before it loads anything."""

from __future__ import annotations

import socket

import pytest

from modellink_lora.cli import infer
from modellink_lora.config.errors import UserError


def test_copies_of_the_model_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"4 processes are 2 copies of the model.*start 2, or give a larger"):
        infer.main(["--task", "greedy", "--tensor-model-parallel-size", "2"])


@pytest.mark.parametrize("task, package", [("server", "uvicorn"), ("web", "gradio")])
def test_a_missing_package_is_named_with_the_way_to_get_it(
    task: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infer, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(UserError) as caught:
        infer.main(["--task", task])
    assert str(caught.value) == f"--task {task} needs {package}: pip install modellink_lora[web]"


def test_a_taken_port_is_found_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(infer, "find_spec", lambda name: object())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: .*choose another port"):
            infer.main(["--task", "server", "--port", str(port)])


def test_flags_of_training_scripts_are_taken_and_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        infer.main(["--task", "greddy", "--use-kv-cache", "--seq-length", "4096", "--micro-batch-size", "1"])
    assert "'greddy' is not one of greedy" in capsys.readouterr().err
