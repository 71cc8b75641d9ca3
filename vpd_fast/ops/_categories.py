"""Token -> category assignments in the forms that kernels read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from vpd_fast.ops._checks import check


@dataclass(frozen=True)
class Categories:
    """Which category each of L tokens belongs to; the tensors are on one device.

    ids: (L,) int32, -1 for no category. weights: (count,) float32, by which the sum over a category's tokens is
    multiplied; 0 for an empty category. tokens: int32, the tokens that have a category, sorted by category, then by
    token. offsets: (count + 1,) int32: category c owns tokens[offsets[c]:offsets[c + 1]].
    """

    count: int
    ids: torch.Tensor
    weights: torch.Tensor
    tokens: torch.Tensor
    offsets: torch.Tensor

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """(L, count): maps per token times this are maps per category."""
        one_hot = self.ids[:, None] == torch.arange(self.count, device=self.ids.device)
        return one_hot.to(dtype) * self.weights.to(dtype)


def category_addresses(categories: Categories | None) -> tuple[int, int]:
    """Addresses of ids and weights, 0 without categories, as native kernels take them."""
    return (0, 0) if categories is None else (categories.ids.data_ptr(), categories.weights.data_ptr())


# Making them reads the ids, which on a GPU waits for it; a model asks for the same ones in every layer. What is kept
# with them tells whether the ids changed: a copy, or on a GPU PyTorch's count of its own writes.
_CACHE: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def categories_of(ids: torch.Tensor, count: int, mean: bool) -> Categories:
    """Categories of (L,) integer ids, remembered while the tensor lives and is not changed.

    mean: a category's map is the mean over its tokens, otherwise the sum. Raises InputError for ids out of range.
    """
    on_cpu = ids.device.type == "cpu"
    if not on_cpu and ids.is_inference():  # has no count of writes
        return _make(ids, count, mean)
    state, cached = _CACHE.get(ids) or (None, {})
    if state is None or not (torch.equal(ids, state) if on_cpu else ids._version == state):
        cached = {}
        _CACHE[ids] = (ids.detach().clone() if on_cpu else ids._version, cached)
    if (count, mean) not in cached:
        cached[count, mean] = _make(ids, count, mean)
    return cached[count, mean]


def _make(ids: torch.Tensor, count: int, mean: bool) -> Categories:
    on_cpu = ids.detach().to("cpu", torch.int64)
    low, high = int(on_cpu.min()), int(on_cpu.max())
    check(
        low >= -1 and high < count,
        f"categories must be -1 (no category) or in [0, num_categories={count}), got values from {low} to {high}",
    )
    used = on_cpu >= 0
    sizes = torch.bincount(on_cpu[used], minlength=count)
    weights = (sizes > 0).float()
    if mean:
        weights /= sizes.clamp(min=1)
    order = torch.argsort(on_cpu, stable=True)
    offsets = torch.zeros(count + 1, dtype=torch.int64)
    torch.cumsum(sizes, 0, out=offsets[1:])
    tensors = (on_cpu.int(), weights, order[used[order]].int(), offsets.int())
    return Categories(count, *(t.to(ids.device) for t in tensors))
