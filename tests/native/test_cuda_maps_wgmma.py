"""The CUDA kernel of cross_attention_maps with wgmma, compiled for the CPU over an emulation.

Its results are held to the same error budget as those of the kernel with mma.sync (test_cuda_emulation.py): a product
is scaled and reduced in one fma there, so each step rounds at most as often.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from .devices import A100, H200, Device
from .test_cuda_emulation import FORMS, TOKENS_OF_WORDS, Case, check, make_problem, run

SCHEDULES = ("heads_loop", "cluster")
schedules = pytest.mark.parametrize("schedule", SCHEDULES)
BF16, FP16 = torch.bfloat16, torch.float16


def run_and_check(cuda, case: Case, schedule: str = "auto", warpgroups: int = 0, device: Device = H200) -> None:
    p = make_problem(case)
    check(p, *run(cuda, p, schedule, device, warpgroups))


@schedules
@pytest.mark.parametrize(
    ("length", "dim", "warpgroups"),
    [
        (1, 40, 1),
        (77, 40, 1),
        (80, 40, 2),
        (81, 40, 1),
        (150, 40, 2),
        (64, 48, 2),
        (77, 80, 1),
        (145, 80, 2),
        (160, 80, 1),
        (77, 160, 1),
        (80, 160, 2),
        (150, 160, 2),
        (9, 8, 1),
        (95, 128, 2),
    ],
)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_every_kernel(cuda, length: int, dim: int, warpgroups: int, dtype: torch.dtype, schedule: str) -> None:
    """Rows that end within a warp, and a second warpgroup with few of them."""
    heads = 2 if dim > 40 else 3
    run_and_check(cuda, Case(n=70, length=length, dim=dim, heads=heads, dtype=dtype), schedule, warpgroups)


@schedules
@pytest.mark.parametrize("n", [1, 15, 17, 63, 64, 65, 129])
def test_queries(cuda, n: int, schedule: str) -> None:
    run_and_check(cuda, Case(n=n, length=20, dim=8, heads=2), schedule, 1)


@schedules
@pytest.mark.parametrize("heads", [1, 2, 5, 8, 9])
def test_heads(cuda, heads: int, schedule: str) -> None:
    """More heads than stages, and such that no power of two divides."""
    run_and_check(cuda, Case(n=20, length=20, dim=8, heads=heads), schedule, 1)


@schedules
@pytest.mark.parametrize("shared_tokens", [False, True])
def test_images(cuda, shared_tokens: bool, schedule: str) -> None:
    run_and_check(cuda, Case(n=35, length=30, dim=8, batch=3, shared_tokens=shared_tokens), schedule)


@schedules
@pytest.mark.parametrize("average", [True, False], ids=["averaged", "each head"])
@pytest.mark.parametrize(
    "categories", [None, TOKENS_OF_WORDS, (-1,) * 40], ids=["tokens", "categories", "no categories"]
)
@pytest.mark.parametrize("form", list(FORMS))
def test_forms_of_maps(cuda, form: str, categories: tuple[int, ...] | None, average: bool, schedule: str) -> None:
    case = Case(n=70, dim=8, batch=2, categories=categories, average=average, **FORMS[form])
    run_and_check(cuda, case, schedule)


@pytest.mark.parametrize("case", [Case(spread=1e4), Case(spread=1e4, dtype=FP16, scale=3.0), Case(scale=0.0)])
def test_extreme_logits(cuda, case: Case) -> None:
    """Among them such whose exponents are no longer one fma."""
    p = make_problem(case)
    out, maps = run(cuda, p, warpgroups=0)
    assert out.isfinite().all()
    assert maps.sum(-1).sub(p.weight).abs().max() < 1e-5
    if case.spread == 1:
        check(p, out, maps)


def test_what_is_not_finite_stays_in_its_row(cuda) -> None:
    p = make_problem(Case(n=70, length=77))
    expected = run(cuda, p, warpgroups=1)
    for special in (float("nan"), float("inf")):
        p.q[0, 5, 3] = special  # of head 0
        out, maps = run(cuda, p, warpgroups=1)
        # Other rows of the warp then have exponents, of up to 16, as of huge scores, which may flip a rounding.
        for x, y, own, error in (
            (out, expected[0], (0, 5, slice(40)), torch.finfo(BF16).eps),
            (maps, expected[1], (0, 0, 5), 16 * torch.finfo(torch.float32).eps),
        ):
            assert x[own].isnan().all()
            x[own] = y[own]
            assert (x - y).double().norm() <= error * y.double().norm()


@schedules
@pytest.mark.parametrize(("length", "warpgroups"), [(77, 1), (150, 2)])
def test_results_do_not_depend_on_the_order_of_threads(cuda, length: int, warpgroups: int, schedule: str) -> None:
    """Warps, copies, products and stores come in the longest waiting's order, the last one's, and random ones."""
    case = Case(n=100, length=length, dim=80, heads=4, categories=tuple(i % 7 - 1 for i in range(length)))
    p = make_problem(replace(case, addend="same"))
    first, *others = (run(cuda, p, schedule, H200._replace(order=order), warpgroups) for order in range(5))
    check(p, *first)
    for other in others:
        assert all(itertools.starmap(torch.equal, zip(first, other, strict=True)))


@pytest.mark.parametrize("length", [40, 150])
def test_warpgroups_do_not_change_results(cuda, length: int) -> None:
    p = make_problem(Case(n=130, length=length, heads=2))
    first, second = (run(cuda, p, "heads_loop", H200, warpgroups) for warpgroups in (1, 2))
    assert all(itertools.starmap(torch.equal, zip(first, second, strict=True)))


@pytest.mark.parametrize(
    ("processors", "warpgroups", "sharing"),
    [(1, 2, 1), (2, 2, 2), (4, 2, 4), (7, 2, 4), (8, 1, 4), (132, 1, 4)],
)
def test_blocks_fill_the_device(cuda, processors: int, warpgroups: int, sharing: int) -> None:
    """Blocks have one warpgroup where all run at once, else two, which share what they read; so are heads shared."""
    p, device = make_problem(Case(n=100, length=100, dim=48, heads=4)), H200._replace(processors=processors)
    shared = []
    for chosen in (0, warpgroups):
        check(p, *run(cuda, p, "auto", device, chosen))
        assert cuda.blocks() == (2 if warpgroups == 1 else 1) * sharing
        shared.append(cuda.shared_bytes())
    assert shared[0] == shared[1]


@pytest.mark.parametrize(
    ("change", "schedule", "device", "message"),
    [
        ({"length": 161}, "auto", H200, "more than 160 tokens"),
        ({"dim": 168}, "auto", H200, "more than 160 elements"),
        ({"dim": 20}, "auto", H200, "not a multiple of 8"),
        ({"dtype": torch.float32}, "auto", H200, "must be bfloat16 or float16"),
        ({"maps_dtype": None}, "auto", H200, "no maps are wanted"),
        ({"scale": -1.0}, "auto", H200, "the scale is negative"),
        ({}, "split", H200, "not by way of scratch memory"),
        ({}, "auto", A100, "no wgmma"),
        ({}, "auto", H200._replace(major=10), "no wgmma"),
    ],
)
def test_what_it_cannot_run(cuda, change: dict, schedule: str, device: Device, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(cuda, make_problem(replace(Case(), **change)), schedule, device, 0)


def test_numbers_of_warpgroups_that_no_kernel_has_are_refused(cuda) -> None:
    for case, warpgroups in ((Case(), 3), (Case(length=150, dim=160), 1)):
        with pytest.raises(RuntimeError, match="invalid argument"):
            run(cuda, make_problem(case), "auto", H200, warpgroups)


@pytest.mark.parametrize("tensor", ["q", "k", "v"])
def test_rows_that_tma_cannot_read_are_refused(cuda, tensor: str) -> None:
    x = getattr(make_problem(Case()), tensor)
    wide = torch.zeros(*x.shape[:-1], x.shape[-1] + 4, dtype=x.dtype)
    for bad, message in (
        (x[..., 4:], "not a multiple of 16 bytes"),
        (wide[..., : x.shape[-1]], "not a multiple of 8 elements"),
        (x[:, :1].expand_as(x), "rows that share memory"),
    ):
        p = make_problem(Case())
        setattr(p, tensor, bad)
        with pytest.raises(ValueError, match=message):
            run(cuda, p, warpgroups=0)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"n": 0}])
def test_empty(cuda, sizes: dict) -> None:
    cuda.launches()
    run(cuda, make_problem(replace(Case(), **sizes)), warpgroups=0)
    assert cuda.launches() == 0
