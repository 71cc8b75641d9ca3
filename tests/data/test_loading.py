"""The loader gives the same batches whatever the workers, ranks and restarts."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from vpd_fast.data.loading import TrainLoader
from vpd_fast.data.sample import Sample
from vpd_fast.errors import DatasetError, ImageError, InputError


class Numbers:
    """Sample i is an image full of i; those in `broken` cannot be read."""

    task, class_names = "depth", ()

    def __init__(self, count: int, broken: tuple[int, ...] = ()) -> None:
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"number {index}"

    def load(self, index: int) -> Sample:
        if index in self.broken:
            raise ImageError(f"{index}.jpg is broken")
        return Sample(np.full((2, 2, 3), index, np.uint8), np.zeros((2, 2), np.float32), self.name(index))


def transform(sample: Sample, rng: np.random.Generator, position: int) -> dict:
    image = torch.from_numpy(sample.image).float() + float(rng.random())
    return {"image": image, "class_id": position, "sentence": sample.name}


def take(count: int, start: int = 0, dataset=None, **options) -> list[dict]:
    loader = TrainLoader(dataset or Numbers(11), transform, batch_size=2, seed=3, **options)
    return list(islice(loader.batches(start), count))


def same(a: list[dict], b: list[dict]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            assert torch.equal(x[key], y[key]) if isinstance(x[key], torch.Tensor) else x[key] == y[key], key


def test_an_epoch_has_every_sample_at_most_once_and_the_next_another_order():
    batches = take(10)
    epochs = [torch.cat([b["index"] for b in batches[i : i + 5]]).tolist() for i in (0, 5)]
    for epoch in epochs:
        assert len(set(epoch)) == 10
    assert epochs[0] != epochs[1]
    assert batches[0]["image"].shape == (2, 2, 2, 3)
    assert batches[0]["class_id"].tolist() == [0, 1]
    assert batches[4]["class_id"].tolist() == [8, 9]
    assert batches[1]["sentence"] == [f"number {i}" for i in batches[1]["index"].tolist()]
    fractions = torch.cat([b["image"][:, 0, 0, 0] % 1 for b in batches])
    assert len(set(fractions.tolist())) == 20  # random numbers of their own


def test_workers_change_nothing():
    same(take(7), take(7, workers=2))


@pytest.mark.parametrize("start", [1, 4, 5, 8])
def test_continuing_gives_what_an_unbroken_run_has(start):
    same(take(12)[start:], take(12 - start, start))


def test_ranks_split_the_order_of_one_process():
    whole = TrainLoader(Numbers(12), transform, batch_size=4, seed=3)
    parts = [TrainLoader(Numbers(12), transform, batch_size=2, seed=3, rank=r, world_size=2) for r in (0, 1)]
    assert whole.epoch_length == parts[0].epoch_length == 3
    for number, batch in enumerate(islice(whole.batches(), 5)):
        first, second = (next(part.batches(number)) for part in parts)
        assert torch.equal(batch["image"][0::2], first["image"])
        assert torch.equal(batch["image"][1::2], second["image"])


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_samples_are_replaced_and_told(workers):
    data = Numbers(10, broken=(4, 7))
    batches = take(5, dataset=data, workers=workers)
    assert not {4, 7} & set(torch.cat([b["index"] for b in batches]).tolist())
    messages = sorted(message for b in batches for message in b["skipped"])
    assert {"number 4: 4.jpg is broken", "number 7: 7.jpg is broken"} <= set(messages)
    same(batches[2:], take(3, 2, dataset=data))
    clean = take(5, dataset=Numbers(10))
    for batch, other in zip(batches, clean, strict=True):  # the others are what they were
        kept = [i for i in range(2) if other["index"][i] not in (4, 7)]
        assert torch.equal(batch["image"][kept], other["image"][kept])


def test_too_many_broken_samples():
    for workers in (0, 2):
        with pytest.raises(ImageError, match="^4.jpg is broken$"):
            take(5, dataset=Numbers(10, broken=(4,)), on_error="raise", workers=workers)
    with pytest.raises(DatasetError, match="more than 1 samples could not be read; the last: number"):
        take(5, dataset=Numbers(10, broken=(1, 2, 3, 4)), max_failures=1)
    with pytest.raises(DatasetError, match="10 samples in a row"):
        take(1, dataset=Numbers(10, broken=tuple(range(10))))


@pytest.mark.parametrize("workers", [0, 1])
def test_whatever_reading_raises_is_one_broken_sample(workers):
    data = Foreign(10, broken=(4, 7))
    batches = take(5, dataset=data, workers=workers)
    assert not {4, 7} & set(torch.cat([b["index"] for b in batches]).tolist())
    messages = {message for b in batches for message in b["skipped"]}
    assert "number 4: number 4: the sample cannot be read (KeyError: 'line 4')" in messages
    with pytest.raises(DatasetError, match="^number 4: the sample cannot be read"):
        take(5, dataset=data, on_error="raise", workers=workers)


class Foreign(Numbers):
    """Raises what no list of exceptions foresees."""

    def load(self, index: int) -> Sample:
        if index in self.broken:
            raise KeyError(f"line {index}")
        return super().load(index)


def test_bad_arguments():
    with pytest.raises(InputError, match="3 samples do not fill a batch of 2 on each of 2"):
        take(1, dataset=Numbers(3), world_size=2)
    with pytest.raises(InputError, match='"skip" or "raise"'):
        take(1, on_error="ignore")
    with pytest.raises(InputError, match="rank < world_size"):
        take(1, rank=1)
