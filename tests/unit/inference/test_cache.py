"""The key/value cache keeps what each row wrote, whatever the others do."""

from __future__ import annotations

import torch

from modellink_lora.config.model import ModelConfig
from modellink_lora.inference.cache import KeyValueCache, Places, cache_bytes

CPU = torch.device("cpu")


def write(cache: KeyValueCache, rows: list[int], starts: list[int], lengths: list[int], value: float) -> torch.Tensor:
    places = Places.of(rows, starts, lengths, cache.slots, CPU)
    new = torch.full((len(rows), max(lengths), 1, 2), value)
    return cache.extend(0, new, -new, places)[0]


def test_rows_of_any_length_and_order_keep_their_own() -> None:
    cache = KeyValueCache(1, 3, 6, 1, 2, torch.float32, CPU)
    write(cache, [0, 1, 2], [0, 0, 0], [3, 5, 1], 1.0)
    seen = write(cache, [2, 0], [1, 3], [1, 1], 2.0)
    assert seen.shape == (2, 1, 4, 2)
    keys = cache.layers[0][0][:, 0, :6, 0]
    assert keys.tolist() == [[1, 1, 1, 2, 0, 0], [1, 1, 1, 1, 1, 0], [1, 2, 0, 0, 0, 0]]
    assert torch.equal(cache.layers[0][1][:, 0, :6, 0], -keys)


def test_copies_read_before_they_write_and_growth_keeps() -> None:
    cache = KeyValueCache(1, 2, 4, 1, 2, torch.float32, CPU)
    write(cache, [0], [0], [4], 1.0)
    write(cache, [1], [0], [4], 2.0)
    cache.copy([1, 0], [0, 1], 2)
    grown = cache.grown(3, 5)
    assert grown.layers[0][0][:, 0, :5, 0].tolist() == [[2, 2, 1, 1, 0], [1, 1, 2, 2, 0], [0] * 5]


def test_the_announced_size_is_the_size() -> None:
    config = ModelConfig(num_layers=3, hidden_size=32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=8,
                         vocab_size=5, max_position_embeddings=9, normalization="RMSNorm", swiglu=True,
                         position_embedding_type="rope")  # fmt: skip
    cache = KeyValueCache(3, 2, 7, 1, 8, torch.bfloat16, CPU)
    assert cache.store.numel() * 2 == cache_bytes(config, 3, 2, 2, 7, 2)
