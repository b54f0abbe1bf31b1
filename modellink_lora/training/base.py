"""Where a run's base model comes from: a checkpoint, or random weights said aloud."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modellink_lora.checkpoint.adapter import base_fingerprint
from modellink_lora.checkpoint.megatron_dist import open_megatron
from modellink_lora.checkpoint.rank_files import HF_FILES, RankFiles
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.build import RandomWeights, Weights
from modellink_lora.models.families import check_tensors, family_of, guess_model_type
from modellink_lora.models.family import Family


@dataclass(frozen=True)
class Base:
    """Dimensions and weights of the model under the adapter."""

    config: ModelConfig  # vocabulary padded for this run
    family: Family
    weights: Weights
    root: Path | None

    def fingerprint(self) -> str | None:
        """Identity of the weights; None for random ones. Reads a few tensors."""
        return base_fingerprint(self.config, self.weights.read) if self.root else None

    @property
    def adapter_inside(self) -> Path | None:
        """Root of the checkpoint where a LoRA adapter lies in the same files, as ModelLink's mcore runs save it."""
        return self.root if isinstance(self.weights, RankFiles) and self.weights.holds_adapter else None

    @property
    def tokenizer_folder(self) -> Path | None:
        """Tokenizer and config kept at conversion, if there are any."""
        kept = self.root / HF_FILES if self.root else None
        return kept if kept and (kept / "tokenizer_config.json").is_file() else None


def open_base(load: str | None, given: Mapping[str, Any], *, tp: int, seed: int, use_mcore_models: bool | None) -> Base:
    """The checkpoint `load`, or random weights of the model that flags describe.

    Args:
        given: ModelConfig fields the user typed; they must agree with the checkpoint.
    """
    if not load:
        config = ModelConfig(**{**given, "hf_model_type": guess_model_type(given)})
        check_tensors(config)
        config = dataclasses.replace(config, padded_vocab_size=_padded(config, tp, given))
        family = family_of(config.hf_model_type)
        return Base(config, family, RandomWeights(family, config, seed), None)
    files = open_megatron(Path(load), flag="--load", model_flags=given)
    if use_mcore_models and files.spelling == "legacy":
        raise UserError(f"--use-mcore-models contradicts --load {load}, which holds legacy names: remove the flag")
    config = dataclasses.replace(files.config, padded_vocab_size=_padded(files.config, tp, given))
    return Base(config, files.family, files, Path(load))


def _padded(config: ModelConfig, tp: int, given: Mapping[str, Any]) -> int:
    """Vocabulary rows of this run: as asked for, else as stored if TP divides them, else the next multiple."""
    return config.padded_vocab_size if "padded_vocab_size" in given else config.padded_for(tp)
