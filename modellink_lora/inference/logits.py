"""Logits of prompts from an unmerged model on any layout, written to a file that any program can compare with.

Letters: n prompts, s sequence, v vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from safetensors.torch import save_file
from torch import Tensor

from modellink_lora.checkpoint.dtypes import dtype_name
from modellink_lora.checkpoint.store import replacing_file
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.logits import LogitsConfig
from modellink_lora.config.model import ModelConfig
from modellink_lora.config.parallel import ParallelConfig
from modellink_lora.data.prompt import Conversation, Message, encode_prompt
from modellink_lora.data.templates import get_template
from modellink_lora.data.text_encoder import TextEncoder
from modellink_lora.data.tokenizer import load_tokenizer
from modellink_lora.device import Device
from modellink_lora.inference.prompt_file import read_prompts
from modellink_lora.inference.request import PLAIN, TUNED, Choice, NotFinite, not_finite
from modellink_lora.models.build import GPT
from modellink_lora.models.finite import fits
from modellink_lora.parallel.context import ParallelContext, make_context
from modellink_lora.parallel.random import seed_everything
from modellink_lora.training.base import open_base
from modellink_lora.training.setup import choose_lora, set_up

_SEED = 1234  # nothing is drawn in evaluation mode; megatron-core wants its streams seeded all the same


def prompt_logits(
    config: LogitsConfig, parallel: ParallelConfig, *, device: Device, torch_device: torch.device
) -> None:
    """Write `ids.N` [s] and `logits.N` [s, v] of every prompt N. The default process group exists.

    Raises:
        UserError: prompts, checkpoint, adapter or layout do not fit.
    """
    if parallel.num_layers_per_virtual_pipeline_stage:
        raise UserError(
            "--num-layers-per-virtual-pipeline-stage interleaves the stages of training and is of no use here: leave "
            "it out; adapters load at any layout"
        )
    prompts = read_prompts(Path(config.prompt_file))
    context = make_context(parallel, torch_device)
    base = open_base(config.load, {}, tp=context.tp_size, seed=_SEED, use_mcore_models=None)
    wanted = config.lora_load or base.adapter_inside
    lora, adapter = choose_lora({}, config.lora_load, base) if wanted else (LoraConfig(), None)  # no target, no layer
    folder = config.tokenizer_name_or_path or base.tokenizer_folder
    if folder is None:
        raise UserError(f"--load {config.load} keeps no tokenizer: give its folder to --tokenizer-name-or-path")
    tokenizer = load_tokenizer(
        folder,
        prompt_type=config.prompt_type,
        use_fast=config.use_fast_tokenizer,
        trust_remote_code=config.trust_remote_code,
    )
    template = get_template(config.prompt_type)
    encoder = TextEncoder(tokenizer, split_special_tokens=True, template_text=template.text)
    ids = [encode_prompt(Conversation((Message("user", prompt),)), template, encoder) for prompt in prompts]
    _check(ids, config, vocab_size=base.config.vocab_size, positions=_longest(base.config))
    seed_everything(_SEED, context, device)
    setup = set_up(base, lora, adapter, context, device, dtype=config.dtype, seed=_SEED, overrides={})
    logits = forward_logits(setup.chunks[0], ids, context, Choice(TUNED) if adapter else PLAIN)
    if not context.is_main:
        return
    for note in setup.notes:
        print(note)
    tensors = {f"ids.{n}": torch.tensor(row) for n, row in enumerate(ids)}
    tensors |= {f"logits.{n}": tensor for n, tensor in enumerate(logits)}
    about = {"load": config.load, "lora_load": config.lora_load or "", "prompt_type": config.prompt_type,
             "prompts": json.dumps(prompts, ensure_ascii=False)}  # fmt: skip
    with replacing_file(Path(config.output)) as temporary:
        save_file(tensors, temporary, metadata=about)
    what = f"{config.load} with the unmerged adapter {adapter.folder}" if adapter else f"{config.load}, no adapter"
    print(f"{what}; {config.dtype}, TP {context.tp_size} x PP {context.pp_size}")
    for prompt, row, tensor in zip(prompts, ids, logits, strict=True):
        best = int(tensor[-1].argmax())
        print(f"  {len(row):4} tokens, next {tokenizer.decode([best])!r} ({tensor[-1, best]:.4f}) after {prompt!r}")
    print(f"logits of {len(prompts)} prompts written to {config.output}", flush=True)


def forward_logits(
    model: GPT, ids: Sequence[Sequence[int]], context: ParallelContext, choice: Choice = PLAIN
) -> list[Tensor]:
    """Logits [s, v] of each row of `ids` in fp32 on the CPU, padding of the vocabulary cut off; the same on every rank.

    Raises NotFinite, on every rank, unless all of them are finite.

    Args:
        choice: the adapter in `model`, for messages.

    One row is one micro-batch, padded on the right to the longest: in a causal model no real token sees the padding.
    """
    block = context.tp_size if context.sequence_parallel else 1
    length = -(-max(map(len, ids)) // block) * block
    vocab = model.model_config.vocab_size

    def rows() -> Iterator[Tensor]:
        for row in ids:
            yield torch.tensor([[*row, *[0] * (length - len(row))]], device=context.device)  # [1, s]

    def forward_step(data: Iterator[Tensor], model: GPT) -> tuple[Tensor, Any]:
        tokens = next(data)
        positions = torch.arange(length, device=context.device)[None]  # [1, s]
        # [1, s, v] on every tensor rank of the last stage, hidden states on the others
        output = model(tokens, positions, None, runtime_gather_output=True)
        return output, lambda logits, non_loss_data: logits[0, :, :vocab].float().cpu()

    model.eval()
    with torch.no_grad():
        collected = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=rows(),
            model=[model],
            num_microbatches=len(ids),
            seq_length=length,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    last = dist.get_process_group_ranks(context.pp_group)[-1]
    result = []
    for n, row in enumerate(ids):
        logits = collected[n] if context.is_last_stage else torch.empty(length, vocab)
        if context.pp_size > 1:
            logits = logits.to(context.device)
            dist.broadcast(logits, src=last, group=context.pp_group)
        logits = logits[: len(row)].cpu().contiguous()
        if not fits(logits, logits.dtype):
            at = int(logits.isfinite().all(1).int().argmin()) + 1
            dtype = dtype_name(model.config.params_dtype, where="the model")
            error = not_finite(f"after token {at} of {len(row)}", choice, dtype)
            raise NotFinite(error.what, prompt=f"prompt {n + 1}", index=n)
        result.append(logits)
    return result


def _longest(model: ModelConfig) -> int:
    return min(filter(None, (model.max_position_embeddings, model.exact_length)))


def _check(ids: Sequence[Sequence[int]], config: LogitsConfig, *, vocab_size: int, positions: int) -> None:
    for n, row in enumerate(ids):
        where = f"--prompt-file {config.prompt_file}: prompt {n + 1}"
        if not row:
            raise UserError(f"{where} has no token: write something, or choose a --prompt-type that adds some")
        if len(row) > positions:
            raise UserError(f"{where} has {len(row)} tokens, the model has {positions} positions: shorten it")
        if max(row) >= vocab_size:
            raise UserError(f"{where} has token id {max(row)}, the model has {vocab_size}: give it its own tokenizer")
