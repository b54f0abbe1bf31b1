"""How far a merged model's logits are from those of base and adapter unmerged, both run here, on one process.

Everything is computed in fp32, so what remains is what merging did to the weights: their rounding.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modellink_lora.checkpoint.adapter import Adapter
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.convert import ConvertConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.parallel import ParallelConfig
from modellink_lora.convert.sources import Source, open_merge, open_source
from modellink_lora.data.tokenizer import load_tokenizer
from modellink_lora.device import Device
from modellink_lora.inference.logits import forward_logits
from modellink_lora.inference.model import SourceWeights
from modellink_lora.inference.request import PLAIN, TUNED, Choice, NotFinite
from modellink_lora.parallel.context import ParallelContext, make_context
from modellink_lora.parallel.random import seed_everything
from modellink_lora.training.base import Base
from modellink_lora.training.setup import set_up

_SEED = 1234  # nothing is drawn in evaluation mode


def compare_logits(
    convert: ConvertConfig,
    merged: Path,
    lora_flags: Mapping[str, Any],
    *,
    device: Device,
    torch_device: torch.device,
    say: Callable[[str], None],
) -> float:
    """Say and return the greatest difference of a logit. The default process group, of one process, exists."""
    assert convert.verify_logits is not None and convert.target in ("hf", "mg")
    context = make_context(ParallelConfig(), torch_device)
    source = open_source(convert)
    ids = token_ids(
        convert.verify_logits, source.companions(convert), source.config.vocab_size,
        trust_remote_code=convert.trust_remote_code,
    )  # fmt: skip
    if len(ids) > source.config.max_position_embeddings:
        raise UserError(f"--verify-logits has {len(ids)} tokens, the model has {source.config.max_position_embeddings} "
                        "positions: shorten it")  # fmt: skip
    adapter = open_merge(
        dataclasses.replace(convert, lora_load=convert.lora_load or convert.load_dir), lora_flags, lambda: source.config
    )
    before = _logits(source, adapter, ids, context, device)
    kind = "hf" if (merged / "config.json").is_file() else "mg"
    result = ConvertConfig(save_dir=convert.save_dir, load_dir=str(merged), load_model_type=kind)
    after = _logits(open_source(result), None, ids, context, device)
    gap = (before - after).abs().max().item()
    same = int((before.argmax(-1) == after.argmax(-1)).sum())
    say(
        f"logits of {len(ids)} tokens, merged against base + adapter, in fp32: greatest difference {gap:.3g} "
        f"(logits reach {before.abs().max().item():.3g}); the same best token at {same} of {len(ids)} positions"
    )
    return gap


def token_ids(
    text: str, tokenizer_folder: Path | None, vocab_size: int, *, trust_remote_code: bool = False
) -> Sequence[int]:
    """Token ids of a prompt, or those written out, e.g. `1,15,27`."""
    if re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*", text):
        ids = [int(word) for word in text.split(",")]
    elif tokenizer_folder is None:
        raise UserError("--verify-logits has a text, but the model came without a tokenizer: give token ids, e.g. 1,15")
    else:
        ids = load_tokenizer(str(tokenizer_folder), trust_remote_code=trust_remote_code)(text)["input_ids"]
    if not ids or max(ids) >= vocab_size:
        raise UserError(f"--verify-logits {text!r}: needs at least one token id, all below {vocab_size}")
    return ids


def _logits(
    source: Source, adapter: Adapter | None, ids: Sequence[int], context: ParallelContext, device: Device
) -> Tensor:
    seed_everything(_SEED, context, device)
    base = Base(source.config, source.family, SourceWeights(source), None)
    lora = adapter.meta.lora if adapter else LoraConfig()
    setup = set_up(base, lora, adapter, context, device, dtype="fp32", seed=_SEED, overrides={})
    try:
        return forward_logits(setup.chunks[0], [ids], context, Choice(TUNED) if adapter else PLAIN)[0]
    except NotFinite as error:
        what = "base and adapter" if adapter else "the merged model"
        raise NotFinite(error.what, prompt=f"--verify-logits of {what}") from None
