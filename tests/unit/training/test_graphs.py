"""Runs whose steps cannot be recorded as a graph are refused in one line before any work."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from modellink_lora.cli.accepted import ACCEPTED, INFERENCE_ACCEPTED, REFUSED
from modellink_lora.cli.flags import build_parser
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.config.train import SftDataConfig, TrainConfig
from modellink_lora.device.cpu import CpuDevice
from modellink_lora.training.assembly import fusion_notes
from modellink_lora.training.graphs import _distance, check_graphs
from modellink_lora.verification.run import undecorated

TRAIN: dict[str, Any] = {"train_iters": 9, "lr": 1e-3, "cuda_graph_impl": "local"}
DATA = SftDataConfig(data_path=("x",), seq_length=8)
LLAMA = ModelConfig(
    num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=32, max_position_embeddings=8, swiglu=True,
    normalization="RMSNorm", position_embedding_type="rope",
)  # fmt: skip


class Recording(CpuDevice):
    records_graphs = True


@dataclasses.dataclass
class Layout:
    pp_size: int = 1


def check(*, device: CpuDevice | None = None, data: Any = DATA, model: Any = LLAMA, stages: int = 1) -> None:
    layout: Any = Layout(stages)
    check_graphs(TrainConfig(**TRAIN), data, model, layout, device or Recording())


def test_what_can_be_recorded_is_taken() -> None:
    check()


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ({"device": CpuDevice()}, "needs a CUDA device, this one is cpu: leave it out"),
        ({"stages": 2}, "not offered with pipeline stages"),
        ({"data": dataclasses.replace(DATA, variable_seq_lengths=True)}, "leave out --variable-seq-lengths"),
        ({"model": dataclasses.replace(LLAMA, num_experts=4)}, "a mixture of experts"),
    ],
)
def test_the_way_out_is_named(run: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check(**run)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"fp16": True}, "--fp16"),
        ({"recompute_granularity": "selective"}, "--recompute-granularity"),
        ({"overlap_grad_reduce": True}, "--overlap-grad-reduce"),
    ],
)
def test_what_every_step_decides_anew_is_refused_beside_it(flags: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=f"--cuda-graph-impl local with {named}: "):
        TrainConfig(**TRAIN, **flags)
    TrainConfig(**{**TRAIN, "cuda_graph_impl": "none"}, **flags)


def test_megatrons_older_flags_name_the_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    parser = build_parser("posttrain_gpt.py", "", [TrainConfig, SftDataConfig], refused=REFUSED, accepted=ACCEPTED)
    for words in (["--enable-cuda-graph"], ["--external-cuda-graph"]):
        with pytest.raises(SystemExit):
            parser.parse(words)
        said = capsys.readouterr().err
        assert "give --cuda-graph-impl local" in said and said.count("\n") == 1
    parser.parse(["--cuda-graph-impl", "local", "--cuda-graph-scope", "full_iteration"])


def test_a_warm_up_without_a_graph_is_told_to_be_for_nothing() -> None:
    said = ["--cuda-graph-warmup-steps has no effect without --cuda-graph-impl local"]
    flags = {**TRAIN, "cuda_graph_warmup_steps": 9}
    assert fusion_notes(TrainConfig(**{**flags, "cuda_graph_impl": "none"}), CpuDevice()) == said
    assert fusion_notes(TrainConfig(**flags), CpuDevice()) == []


def test_inference_takes_megatrons_flags_without_effect() -> None:
    assert {"enable-cuda-graph", "external-cuda-graph", "cuda-graph-impl"} <= INFERENCE_ACCEPTED.keys()


def test_verify_compares_with_ordinary_steps() -> None:
    assert undecorated(TrainConfig(**TRAIN)).cuda_graph_impl == "none"


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([0.0, 4.0], [3.0, 4.0], 0.6),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([float("nan"), 4.0], [3.0, 4.0], float("inf")),
        ([float("nan"), 4.0], [float("inf"), 4.0], 0.0),  # a loss that ran away is not the recording's fault
    ],
)
def test_distance(one: list[float], other: list[float], distance: float) -> None:
    assert _distance(torch.tensor(one), torch.tensor(other)).item() == pytest.approx(distance)
