"""Variables that harm a run are told apart from those that do not, and no others are read."""

from __future__ import annotations

from typing import Any

import pytest

from modellink_lora.diagnosis.environment import environment_findings, relevant

HERE: dict[str, Any] = {"device": "cpu", "processes": 1, "cores": 8, "interfaces": ("lo", "eth0", "eth1")}


def level(environment: dict[str, str], name: str, **here: Any) -> str:
    found = {f.what: f for f in environment_findings(environment, **{**HERE, **here})}
    assert bool(found[name].advice) == (found[name].level != "ok")
    return found[name].level


def test_only_listed_variables_are_read() -> None:
    environment = {"AWS_SECRET_ACCESS_KEY": "s3cret", "HF_TOKEN": "hf_x", "NCCL_DEBUG": "INFO", "PATH": "/bin"}
    assert relevant(environment) == {"NCCL_DEBUG": "INFO"}


@pytest.mark.parametrize(
    ("environment", "name", "here", "expected"),
    [
        ({"PYTORCH_NPU_ALLOC_CONF": "x", "PYTORCH_ALLOC_CONF": "x"}, "PYTORCH_NPU_ALLOC_CONF", {"device": "npu"},
         "problem"),
        ({"PYTORCH_NPU_ALLOC_CONF": "x"}, "PYTORCH_NPU_ALLOC_CONF", {"device": "npu"}, "ok"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "x", "PYTORCH_ALLOC_CONF": "x"}, "PYTORCH_CUDA_ALLOC_CONF", {}, "warning"),
        ({}, "OMP_NUM_THREADS", {"processes": 4}, "warning"),
        ({"OMP_NUM_THREADS": "2"}, "OMP_NUM_THREADS", {"processes": 4}, "ok"),
        ({"OMP_NUM_THREADS": "3"}, "OMP_NUM_THREADS", {"processes": 4}, "warning"),
        ({"OMP_NUM_THREADS": "all"}, "OMP_NUM_THREADS", {}, "problem"),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, "CUDA_DEVICE_MAX_CONNECTIONS", {"device": "cuda"}, "warning"),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, "CUDA_DEVICE_MAX_CONNECTIONS", {"device": "cpu"}, "ok"),
        ({"GLOO_SOCKET_IFNAME": "eth"}, "GLOO_SOCKET_IFNAME", {}, "problem"),
        ({"GLOO_SOCKET_IFNAME": "eth1"}, "GLOO_SOCKET_IFNAME", {}, "ok"),
        ({"NCCL_SOCKET_IFNAME": "eth"}, "NCCL_SOCKET_IFNAME", {}, "ok"),
        ({"NCCL_SOCKET_IFNAME": "=eth"}, "NCCL_SOCKET_IFNAME", {}, "problem"),
        ({"NCCL_SOCKET_IFNAME": "^ib0"}, "NCCL_SOCKET_IFNAME", {}, "ok"),
        ({"HCCL_SOCKET_IFNAME": "ib,eth"}, "HCCL_SOCKET_IFNAME", {}, "ok"),
        ({"HCCL_SOCKET_IFNAME": "ib0"}, "HCCL_SOCKET_IFNAME", {}, "problem"),
        ({"ASCEND_LAUNCH_BLOCKING": "1"}, "ASCEND_LAUNCH_BLOCKING", {}, "warning"),
        ({"ASCEND_LAUNCH_BLOCKING": "0"}, "ASCEND_LAUNCH_BLOCKING", {}, "ok"),
        ({"HCCL_CONNECT_TIMEOUT": "60"}, "HCCL_CONNECT_TIMEOUT", {}, "problem"),
        ({"HCCL_CONNECT_TIMEOUT": "1800"}, "HCCL_CONNECT_TIMEOUT", {}, "ok"),
    ],
)  # fmt: skip
def test_a_variable_is_judged(environment: dict[str, str], name: str, here: dict[str, Any], expected: str) -> None:
    assert level(environment, name, **here) == expected
