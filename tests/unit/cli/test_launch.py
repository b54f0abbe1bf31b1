"""What the launcher's environment means, and which defaults a run adds to it."""

from __future__ import annotations

import pytest

from modellink_lora.cli.launch import Launch, set_environment_defaults
from modellink_lora.config.errors import UserError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}


def test_torchrun_says_who_this_process_is() -> None:
    assert Launch.from_environment(TORCHRUN | {"MODELLINK_DEVICE": "cpu"}) == Launch(5, 8, 1, 4, "node0", 29500, "cpu")


def test_torchrun_also_says_which_start_this_is_and_who_holds_the_store() -> None:
    launch = Launch.from_environment(
        TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    )
    assert (launch.attempt, launch.has_store) == ("2", True)
    assert not Launch.from_environment(TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "False"}).has_store


def test_without_a_launcher_there_is_one_process_that_needs_no_port() -> None:
    launch = Launch.from_environment({})
    assert (launch.rank, launch.world_size, launch.local_rank, launch.local_world_size) == (0, 1, 0, 1)
    assert launch.is_first and launch.master_port == 0 and launch.device == "auto"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "8"}, "RANK=8 is not below WORLD_SIZE=8"),
        ({"RANK": "two"}, "RANK='two' in the environment is not a whole number"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR not set"),
    ],
)
def test_half_a_launch_is_a_user_error(change: dict[str, str | None], message: str) -> None:
    environment = {name: value for name, value in (TORCHRUN | change).items() if value is not None}
    with pytest.raises(UserError, match=message):
        Launch.from_environment(environment)


def test_environment_defaults_give_way_to_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    set_environment_defaults("cuda", overlapping=True)
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    set_environment_defaults("cpu", overlapping=True)
    set_environment_defaults("cuda")
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in os.environ, "one queue where nothing overlaps takes speed away"
    set_environment_defaults("cuda", overlapping=True)
    assert os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS") == "1"


def test_defaults_of_the_npu_allocator_do_not_meet_a_setting_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setattr(os, "environ", {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"})
    set_environment_defaults("npu")
    assert "PYTORCH_NPU_ALLOC_CONF" not in os.environ and os.environ["HCCL_CONNECT_TIMEOUT"] == "1800"
    os.environ.pop("PYTORCH_ALLOC_CONF")
    set_environment_defaults("npu")
    assert os.environ["PYTORCH_NPU_ALLOC_CONF"] == "expandable_segments:True"
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:False"
    with pytest.raises(UserError, match="PYTORCH_NPU_ALLOC_CONF and PYTORCH_ALLOC_CONF are both set"):
        set_environment_defaults("npu")


@pytest.mark.parametrize(("said", "meant"), [({}, False), ({"MODELLINK_MINDSPEED": "0"}, False),
                                             ({"MODELLINK_MINDSPEED": "1"}, True)])  # fmt: skip
def test_mindspeed_is_asked_for_in_the_environment(said: dict[str, str], meant: bool) -> None:
    assert (
        Launch.from_environment(said).mindspeed is meant and Launch.from_environment(TORCHRUN | said).mindspeed is meant
    )
