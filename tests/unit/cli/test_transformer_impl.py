"""Where layers of Transformer Engine cannot run, and what has no place beside them: one line before any work."""

from __future__ import annotations

from typing import Any

import pytest

from modellink_lora.cli.accepted import INFERENCE_ACCEPTED, INFERENCE_REFUSED
from modellink_lora.cli.flags import build_parser
from modellink_lora.config.engine import EngineConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.config.train import TrainConfig
from modellink_lora.device.cpu import CpuDevice
from modellink_lora.models.te_spec import check_transformer_engine
from modellink_lora.verification.run import undecorated

TRAIN: dict[str, Any] = {"train_iters": 1, "lr": 1e-3}
LLAMA: dict[str, Any] = dict(
    num_layers=1, hidden_size=64, num_attention_heads=4, vocab_size=32, max_position_embeddings=8, swiglu=True,
    normalization="RMSNorm", position_embedding_type="rope",
)  # fmt: skip


class Pretending(CpuDevice):
    runs_transformer_engine = True


def test_on_another_device_the_way_out_is_named() -> None:
    with pytest.raises(UserError, match="needs a CUDA device, this one is cpu: give --transformer-impl local"):
        check_transformer_engine(ModelConfig(**LLAMA), CpuDevice(), "bf16")


def test_without_the_package_the_command_to_install_it_is_named() -> None:
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if HAVE_TE:
        pytest.skip("Transformer Engine is installed here")
    with pytest.raises(UserError, match="pip install --no-build-isolation"):
        check_transformer_engine(ModelConfig(**LLAMA), Pretending(), "bf16")


def test_fp32_and_experts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.core.extensions.transformer_engine.HAVE_TE", True)
    monkeypatch.setattr(Pretending, "name", "cuda")
    with pytest.raises(UserError, match="TF32"):
        check_transformer_engine(ModelConfig(**LLAMA), Pretending(), "fp32")
    with pytest.raises(UserError, match="mixtures of experts, this model has 4 a layer"):
        check_transformer_engine(ModelConfig(**LLAMA, num_experts=4), Pretending(), "bf16")
    check_transformer_engine(ModelConfig(**LLAMA), Pretending(), "bf16")


def test_the_fused_path_is_refused_beside_it() -> None:
    with pytest.raises(UserError, match="--lora-fusion with --transformer-impl transformer_engine"):
        TrainConfig(**TRAIN, lora_fusion=True, transformer_impl="transformer_engine")


def test_verify_compares_with_the_local_layers() -> None:
    assert undecorated(TrainConfig(**TRAIN, transformer_impl="transformer_engine")).transformer_impl == "local"


def test_inference_says_that_it_multiplies_by_itself() -> None:
    parser = build_parser(
        "inference.py", "", [EngineConfig], refused=INFERENCE_REFUSED, accepted=INFERENCE_ACCEPTED
    )  # fmt: skip
    parser.parse(["--load", "base", "--transformer-impl", "transformer_engine"])
    said: list[str] = []
    parser.report_accepted(said.append)
    assert said == ["--transformer-impl has no effect: the weights are multiplied by an engine of its own, whatever "
                    "trained the adapter"]  # fmt: skip
