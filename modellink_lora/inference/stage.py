"""One pipeline stage of a model for inference: the modules of megatron-core's GPT, called without its training glue.

Why not its own forward: decoding spends most of it on Python that one token does not need (about 1.2 ms a layer), it
knows one position for the whole batch, and its linears cannot take an adapter before their all-reduce.

Letters: b batch, s new tokens of each row, h hidden, n query heads, g query groups, d head dim, l cached slots; heads
and groups are those of this tensor rank. Tokens lie row by row: [b * s, h].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from modellink_lora.device import Device
from modellink_lora.inference.cache import KeyValueCache, Places
from modellink_lora.inference.linear import ServedLinear
from modellink_lora.inference.request import PLAIN, Choice
from modellink_lora.models.build import GPT, capped, head_input
from modellink_lora.models.rope import inverse_frequencies
from modellink_lora.parallel.context import ParallelContext


class Stage:
    """This rank's layers.

    Args:
        model: a filled chunk without adapters, which must be the whole stage; its weights move here.
        names: global names of this stage's layers, in order, e.g. `decoder.layers.4`.
    """

    def __init__(self, model: GPT, names: list[str], context: ParallelContext, device: Device) -> None:
        self.model, self.config, self.context = model.eval(), model.model_config, context
        self.layers = [_Layer(layer, device) for layer in model.decoder.layers]
        self.linears: dict[str, ServedLinear] = {
            f"{name}.{leaf}": linear
            for name, layer in zip(names, self.layers, strict=True)
            for leaf, linear in layer.linears.items()
        }
        self.dtype, self.device = model.config.params_dtype, context.device
        self._frequencies: Tensor | None = None
        if self.config.position_embedding_type == "rope":
            self._frequencies = inverse_frequencies(self.config).to(self.device)
        self._choice = PLAIN
        if context.is_last_stage:
            tied = not self.config.untie_embeddings_and_output_weights
            weight = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
            self._head = device.linear(weight.detach(), None)
            if not tied:
                model.output_layer.weight = None

    def choose(self, choice: Choice) -> None:
        """The adapter of what is computed from now on."""
        if choice != self._choice:
            for linear in self.linears.values():
                linear.choose(choice)
            self._choice = choice

    def new_cache(self, rows: int, slots: int) -> KeyValueCache:
        groups = self.config.num_query_groups // self.context.tp_size
        return KeyValueCache(
            len(self.layers), rows, slots, groups, self.config.kv_channels, self.dtype, self.device
        )  # fmt: skip

    def embed(self, tokens: Tensor, places: Places) -> Tensor:
        """[b, s] -> [b * s, h], of the first stage."""
        hidden = self.model.embedding(tokens, places.positions)  # [s, b, h]
        return hidden.transpose(0, 1).reshape(tokens.numel(), -1)

    def run(self, hidden: Tensor, cache: KeyValueCache, places: Places) -> Tensor:
        """[b * s, h] -> [b * s, h] through the layers; keys and values go to `cache`."""
        turn = self._turn(places)
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden, turn, cache, number, places)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Of the last stage: [n, h] -> fp32 [n, v] over the whole vocabulary, its padding cut off; on every rank.

        A row that holds NaN or infinity is NaN throughout, so that any number of it tells.
        """
        logits = self._head(head_input(self.model.decoder.final_layernorm(hidden), self.config))
        if self.context.tp_size > 1:
            logits = gather_from_tensor_model_parallel_region(logits, group=self.context.tp_group)
        logits = capped(logits, self.config)[:, : self.config.vocab_size].float()
        return logits.add_(0 * logits.sum(1, keepdim=True))  # 0 for a finite sum, else NaN

    def _turn(self, places: Places) -> tuple[Tensor, Tensor] | None:
        """Cosine and signed sine [b, s, 1, 1, rotated channels] of the positions; None without rotary embedding."""
        if self._frequencies is None:
            return None
        angles = places.positions[..., None].float() * self._frequencies
        sine = angles.sin()
        if self.config.rotary_interleaved:  # pairs of neighbours: (x0, x1) -> (x0 c - x1 s, x1 c + x0 s)
            cosine, signed = angles.cos().repeat_interleave(2, -1), torch.stack((-sine, sine), -1).flatten(-2)
        else:
            cosine, signed = angles.cos().repeat(1, 1, 2), torch.cat((-sine, sine), -1)
        return cosine[:, :, None, None].to(self.dtype), signed[:, :, None, None].to(self.dtype)


class _Layer:
    """One decoder layer of any family: norms, residual and activation are the modules that training uses."""

    def __init__(self, layer: TransformerLayer, device: Device) -> None:
        attention, mlp = layer.self_attention, layer.mlp
        self.device, self.attention = device, attention
        self.input_norm, self.mlp_norm = layer.input_layernorm, layer.pre_mlp_layernorm
        self.after_attention = layer.self_attn_bda(False, False)
        self.after_mlp = layer.mlp_bda(False, False)
        self.groups = attention.num_query_groups_per_partition
        self.per_group = attention.num_attention_heads_per_partition // self.groups
        self.channels = attention.hidden_size_per_attention_head
        self.interleaved = attention.config.rotary_interleaved
        self.scale, self.shaping = attention.core_attention.scale, attention.core_attention.shaping
        self.qkv, self.proj = ServedLinear(attention.linear_qkv, device), ServedLinear(attention.linear_proj, device)
        self.linears: Mapping[str, ServedLinear] = {
            "self_attention.linear_qkv": self.qkv, "self_attention.linear_proj": self.proj
        }  # fmt: skip
        if isinstance(mlp, MLP):
            self.fc1, self.activation, self.fc2 = (
                ServedLinear(mlp.linear_fc1, device), mlp.activation_func, ServedLinear(mlp.linear_fc2, device)
            )  # fmt: skip
            self.linears = {**self.linears, "mlp.linear_fc1": self.fc1, "mlp.linear_fc2": self.fc2}
            self.mlp = self._dense
        else:
            self.experts = mlp
            self.mlp = self._mixture

    def __call__(self, hidden: Tensor, turn: tuple[Tensor, Tensor] | None, cache: KeyValueCache, number: int,
                 places: Places) -> Tensor:  # fmt: skip
        attended = self._attend(self.input_norm(hidden), turn, cache, number, places)
        hidden = self.after_attention((self.proj(attended), None), hidden, 0.0)
        return self.after_mlp((self.mlp(self.mlp_norm(hidden)), None), hidden, 0.0)

    def _dense(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))

    def _mixture(self, x: Tensor) -> Tensor:
        return self.experts(x[:, None])[0][:, 0]  # [tokens, 1, h]

    def _attend(self, x: Tensor, turn: tuple[Tensor, Tensor] | None, cache: KeyValueCache, number: int,
                places: Places) -> Tensor:  # fmt: skip
        b, s = places.positions.shape
        # a group's query heads, its key and its value lie side by side
        mixed = self.qkv(x).view(b, s, self.groups, self.per_group + 2, self.channels)
        heads, value = mixed[..., :-1, :], mixed[..., -1, :]  # [b, s, g, n / g + 1, d], [b, s, g, d]
        if self.attention.q_layernorm is not None:
            queries, keys = (
                self.attention.q_layernorm(heads[..., :-1, :]),
                self.attention.k_layernorm(heads[..., -1:, :]),
            )
            heads = torch.cat((queries, keys), -2)
        if turn is not None:
            heads = rotated(heads, *turn, interleaved=self.interleaved)
        query = heads[..., :-1, :]  # [b, s, g, n / g, d]
        keys, values = cache.extend(number, heads[..., -1, :], value, places)  # [b, g, l, d]
        if s == 1 and not self.shaping:
            # the heads of a group take the place of a sequence: no key is repeated for them
            where = None if places.start is not None else places.positions.expand(b, self.per_group)
            out = self.device.attention(query[:, 0], keys, values, causal=False, scale=self.scale, where=where)
            return out.reshape(b, -1)
        query = query.reshape(b, s, -1, self.channels).transpose(1, 2)  # [b, n, s, d]
        where = None if places.start == 0 else places.positions
        out = self.device.attention(query, keys, values, causal=True, scale=self.scale, where=where, **self.shaping)
        return out.transpose(1, 2).reshape(b * s, -1)


def rotated(x: Tensor, cosine: Tensor, signed_sine: Tensor, *, interleaved: bool) -> Tensor:
    """Rotary embedding (Su et al., arXiv:2104.09864) of x [..., d], whose last channels may stay as they are."""
    rotary = cosine.shape[-1]
    turned, rest = (x, None) if rotary == x.shape[-1] else (x[..., :rotary], x[..., rotary:])
    swapped = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if interleaved else turned.roll(rotary // 2, -1)
    turned = torch.addcmul(turned * cosine, swapped, signed_sine)
    return turned if rest is None else torch.cat((turned, rest), -1)
