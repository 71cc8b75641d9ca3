"""The Triton kernels of self_attention for heads wider than 256: chunks, tiles, memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .attention_cases import assert_close, make_qkv, probabilities

kernels = pytest.importorskip("vpd_fast.kernels.self_attention", exc_type=ImportError)
common = pytest.importorskip("vpd_fast.kernels._common", exc_type=ImportError)

DTYPES = [torch.float32, torch.bfloat16]
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not common.INTERPRETED.value, reason="'cuda' checks the same")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(params=["many multiprocessors", "few"])
def large_tiles(request, monkeypatch) -> bool:
    """With few multiprocessors the tiles of 16-bit products are 128 x 128 also where the matrices are small."""
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 1 if request.param == "few" else 132)
    return request.param == "few"


def run(q: Tensor, k: Tensor, v: Tensor, heads: int, **options: int) -> Tensor:
    out = torch.full_like(q, float("nan"), memory_format=torch.contiguous_format)
    kernels.forward(q, k, v, out, heads=heads, scale=0.05, **options)
    return out


def check(out: Tensor, q: Tensor, k: Tensor, v: Tensor, heads: int) -> None:
    exact = probabilities(q.double(), k.double(), v.double(), heads, 0.05)[2]
    assert_close(out, probabilities(q, k, v, heads, 0.05)[2], exact, q.dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(
    "shape", [(1, 130, 129, 1, 257), (2, 63, 65, 2, 264), (1, 1, 1, 1, 512), (1, 129, 300, 1, 320)]
)
def test_tiles_and_their_rests(device: str, large_tiles: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = make_qkv(*shape, dtype=dtype, device=device)
    check(run(q, k, v, shape[3]), q, k, v, shape[3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_do_not_change_a_bit(device: str, dtype: torch.dtype) -> None:
    """Of heads of several images, of whole tiles of rows, and of few rows; and neither does a second run.

    Narrow heads, which are computed in the same way, in fewer steps of the interpreter.
    """
    q, k, v = make_qkv(2, 70, 60, 2, 68, dtype=dtype, device=device)
    whole = run(q, k, v, 2)
    check(whole, q, k, v, 2)
    for rows in (3 * 70, 70, 69, 40):  # in memory at a time, of 64 probabilities
        assert torch.equal(run(q, k, v, 2, max_probabilities=rows * 64), whole), rows
    assert torch.equal(run(q, k, v, 2), whole)


def test_memory_does_not_grow_with_the_queries(monkeypatch) -> None:
    """Sizes that need no memory here: launches are recorded. A small image is one launch of each kernel."""
    recorded: list[dict] = []
    monkeypatch.setattr(kernels, "launch", lambda kernel, grid, on, **arguments: recorded.append(arguments))
    for length, launches in ((64, 2), (4096, 2), (4097, 2), (8193, 6), (16384, 16), (200000, None)):
        recorded.clear()
        q = torch.empty(1, length, 512, dtype=torch.bfloat16, device="meta")
        kernels.forward(q, q, q, q, heads=1, scale=1.0)
        assert launches in (None, len(recorded))
        assert {r["probabilities"].numel() <= kernels.MAX_PROBABILITIES for r in recorded} == {True}
        rows = sorted({(r["first_row"], min(length, r["first_row"] + r["chunk"])) for r in recorded})
        assert [end for _, end in rows] == [start for start, _ in rows[1:]] + [length]  # each row once


def test_two_images_of_the_encoder_at_a_time(monkeypatch) -> None:
    recorded: list[dict] = []
    monkeypatch.setattr(kernels, "launch", lambda kernel, grid, on, **arguments: recorded.append(arguments))
    q = torch.empty(8, 4096, 512, dtype=torch.bfloat16, device="meta")
    kernels.forward(q, q, q, q, heads=1, scale=1.0)
    assert [r["first_head"] for r in recorded] == [0, 0, 2, 2, 4, 4, 6, 6]
    assert {r["probabilities"].shape for r in recorded} == {(2, 4096, 4096)}


def test_several_images_share_a_launch(monkeypatch) -> None:
    recorded: list[dict] = []
    monkeypatch.setattr(kernels, "launch", lambda kernel, grid, on, **arguments: recorded.append(arguments))
    q = torch.empty(33, 1024, 512, dtype=torch.bfloat16, device="meta")
    kernels.forward(q, q, q, q, heads=1, scale=1.0)
    assert [r["first_head"] for r in recorded] == [0, 0, 32, 32]


def test_what_is_not_finite(device: str) -> None:
    """In the second tile of keys, which the other tiles know of by its highest score only."""
    q, k, v = make_qkv(1, 70, 300, 1, 72, device=device)
    exact = run(q, k, v, 1)
    for special in (float("nan"), float("inf")):
        changed = k.clone()
        changed[0, 140, 3] = special
        above = q[0, :, 3] * special > 0 if special == special else torch.ones(70, dtype=torch.bool, device=device)
        assert above.any()
        assert run(q, changed, v, 1)[0, above].isnan().all()
        changed = v.clone()
        changed[0, 299, 3] = special
        new = run(q, k, changed, 1)
        assert not new[0, :, 3].isfinite().any()
        new[0, :, 3] = exact[0, :, 3]
        assert torch.equal(new, exact)


def test_what_it_refuses() -> None:
    def of(length: int, tokens: int, stride: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k = (
            torch.empty(0, dtype=torch.bfloat16, device="meta").as_strided((1, n, 512), (0, step, 1))
            for n, step in ((length, 512), (tokens, stride))
        )
        return q, k, k

    assert kernels.refuse(*of(1 << 30, 1 << 23, 512)) is None
    assert "there are 8388609 keys" in kernels.refuse(*of(4, (1 << 23) + 1, 512))
    assert kernels.refuse(*of(4, 4, 2**24 - 1)) is None
    assert "2**24 elements apart" in kernels.refuse(*of(4, 4, 2**24))
