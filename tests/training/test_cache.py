"""Caches on disk: exact, bounded, and no worse than nothing when the disk misbehaves."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from torch import Tensor

from vpd_fast.training import cache as caches
from vpd_fast.training.cache import LatentCache, TensorCache, TextCache


class Encoder:
    """Counts what it encodes."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return images[:, :, ::2, ::2] * 0.1


def test_latents_are_bitwise_what_was_encoded(tmp_path):
    images, encoder = torch.randn(4, 3, 8, 8), Encoder()
    cache = LatentCache(tmp_path, 10**6, "a")
    first = cache.encode(images, encoder)
    again = LatentCache(tmp_path, 10**6, "a").encode(images.flip(0), encoder)
    assert torch.equal(first, images[:, :, ::2, ::2] * 0.1)
    assert torch.equal(again.flip(0), first)
    assert encoder.seen == 4
    mixed = torch.cat([images[1:2], torch.zeros(1, 3, 8, 8)])
    assert torch.equal(cache.encode(mixed, encoder), mixed[:, :, ::2, ::2] * 0.1)
    assert (encoder.seen, cache.hits, cache.misses) == (5, 1, 5)
    LatentCache(tmp_path, 10**6, "another encoder").encode(images, encoder)
    assert encoder.seen == 9


def test_sentences(tmp_path):
    asked: list[str] = []

    def encoder(sentences: list[str]) -> Tensor:
        asked.extend(sentences)
        return torch.stack([torch.full((2, 3), float(len(text))) for text in sentences])

    cache = TextCache(tmp_path, 10**6, "clip 2")
    found = cache.embed(["one", "three", "one"], encoder)
    assert found[:, 0, 0].tolist() == [3, 5, 3]
    assert cache.embed(["three", "seven"], encoder)[:, 1, 2].tolist() == [5, 5]
    assert asked == ["one", "three", "seven"]


def test_the_bound_holds_and_what_was_used_last_stays(tmp_path):
    size = 128 + 4 * 100  # numpy's header and 100 floats
    cache = TensorCache(tmp_path, 10 * size)
    keys = [f"{i:02d}key" for i in range(30)]
    for i, key in enumerate(keys):
        cache.put(key, torch.full((100,), float(i)))
        os.utime(cache._path(key), (i, i))
        if cache._path(keys[0]).exists():
            assert cache.get(keys[0]) is not None  # used again and again
        assert sum(path.stat().st_size for path in tmp_path.glob("*/*.npy")) <= 10 * size
    assert torch.equal(cache.get(keys[0]), torch.zeros(100))
    assert cache.get(keys[29]) is not None
    assert cache.get(keys[5]) is None


def test_a_broken_file_is_made_again(tmp_path):
    images, encoder = torch.randn(1, 3, 8, 8), Encoder()
    cache = LatentCache(tmp_path, 10**6, "a")
    expected = cache.encode(images, encoder)
    (path,) = tmp_path.glob("*/*.npy")
    whole = path.read_bytes()
    for content in (b"", whole[:40], whole[:-4]):
        path.write_bytes(content)
        assert torch.equal(cache.encode(images, encoder), expected)
        assert path.read_bytes() == whole
    assert encoder.seen == 4


def test_a_full_disk_costs_the_cache_only(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    images, encoder = torch.randn(2, 3, 8, 8), Encoder()
    monkeypatch.setattr(caches, "_save", full)
    cache = LatentCache(tmp_path, 10**6, "a")
    with pytest.warns(UserWarning, match="stops growing .No space left on device"):
        first = cache.encode(images, encoder)
    assert torch.equal(cache.encode(images, encoder), first)
    assert encoder.seen == 4
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
