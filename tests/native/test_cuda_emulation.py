"""The CUDA kernels of cross_attention_maps, compiled for the CPU over an emulation of what they use of a GPU.

The emulation (tests/native/cuda_emulation) runs csrc/cuda/cross_attention_maps.cu and its binding unchanged: warp
instructions with the layouts of the PTX manual, barriers, clusters, asynchronous copies that leave NaN until they are
waited for, shared memory that starts as NaN, and checks of every address. It cannot show how fast a kernel is, nor
what the compiler makes of inline assembly.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from ..helpers.fake_gpu import attention_scratch
from .devices import A100, H200, L40, Device

SCHEDULES = ("heads_loop", "cluster", "split")
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-24}


@dataclass(frozen=True)
class Case:
    """Sizes and options of a call."""

    n: int = 70
    length: int = 40
    dim: int = 40
    heads: int = 3
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    maps_dtype: torch.dtype | None = torch.float32
    average: bool = True
    addend: str = "none"  # none, separate or same (as maps)
    layout: str = "contiguous"  # of maps, or channels_first, or pitched
    categories: tuple[int, ...] | None = None  # of each token
    shared_tokens: bool = False
    scale: float | None = None
    spread: float = 1.0


@dataclass
class Problem:
    """Tensors of a case; addresses outside of these are errors."""

    case: Case
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    addend: torch.Tensor | None
    scale: float
    weight: float
    tokens: torch.Tensor
    offsets: torch.Tensor
    category_weights: torch.Tensor
    matrix: torch.Tensor


def padded(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised, poisoned memory whose rows are 8 elements longer than the tensor's."""
    return torch.full((*shape[:-1], shape[-1] + 8), float("nan"), dtype=dtype)[..., : shape[-1]]


def place_maps(case: Case, dtype: torch.dtype, fill: float = float("nan")) -> torch.Tensor:
    """(B, heads or 1, N, columns) in the layout of the case."""
    columns = case.length if case.categories is None else max(case.categories) + 2
    heads = 1 if case.average else case.heads
    if case.layout == "channels_first":
        memory = torch.full((case.batch, heads, columns + 3, case.n), fill, dtype=dtype)
        return memory[:, :, 3:].mT
    if case.layout == "pitched":
        return torch.full((case.batch, heads, case.n, columns + 5), fill, dtype=dtype)[..., 2 : columns + 2]
    return torch.full((case.batch, heads, case.n, columns), fill, dtype=dtype)


def make_problem(case: Case) -> Problem:
    generator = torch.Generator().manual_seed(case.n * 1000 + case.length)

    def random(*shape: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
        tensor = padded(shape, dtype)
        return tensor.copy_(torch.randn(shape, generator=generator))

    width = case.heads * case.dim
    images = 1 if case.shared_tokens else case.batch
    q = random(case.batch, case.n, width).mul_(case.spread)
    k, v = (random(images, case.length, width) for _ in range(2))
    ids = torch.tensor(case.categories or range(case.length))
    count = int(ids.max()) + (1 if case.categories is None else 2)  # the last category is empty
    matrix = (ids[:, None] == torch.arange(count)).double()
    if case.categories is not None:
        matrix = matrix / matrix.sum(0).clamp(min=1)  # the mean
    order = torch.sort(ids, stable=True).indices[int((ids < 0).sum()) :]
    sizes = torch.bincount(ids[ids >= 0], minlength=count)
    addend = None
    if case.addend != "none":
        addend = place_maps(case, torch.float32)
        addend.copy_(torch.randn(addend.shape, generator=generator))
    return Problem(
        case,
        q,
        k,
        v,
        addend,
        scale=case.dim**-0.5 if case.scale is None else case.scale,
        weight=0.3,
        tokens=order.int(),
        offsets=torch.cat([torch.zeros(1), sizes.cumsum(0)]).int(),
        category_weights=matrix.amax(0).float(),
        matrix=matrix,
    )


def memory_of(x: torch.Tensor) -> tuple[int, int]:
    """Address and bytes from the first to the last element of x."""
    return x.data_ptr(), (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))) * x.element_size()


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run(
    cuda, p: Problem, schedule: str = "auto", device: Device = H200, warpgroups: int | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """out (B, N, heads * D) and maps (B, heads or 1, N, columns) that the emulated device computes.

    warpgroups: of the kernel with wgmma (0: it chooses), or None for the one with mma.sync.
    """
    case = p.case
    cuda.configure(device.processors, device.major, device.shared_limit, device.order)
    out = torch.full((case.batch, case.n, case.heads * case.dim), float("nan"), dtype=case.dtype)
    maps = None if case.maps_dtype is None else place_maps(case, case.maps_dtype)
    addend = p.addend
    if case.addend == "same":
        maps.copy_(addend)
        addend = maps
    shape = (case.batch, case.n, case.length, case.heads, case.dim)
    name = name_of(case.dtype)
    ask = cuda.cross_attention_maps_scratch if warpgroups is None else lambda *_: 0
    scratch_bytes = ask(name, shape, maps is not None, case.average, schedule, 0)
    scratch = torch.full((scratch_bytes // 4,), float("nan"))

    read = (p.q, p.k, p.v, addend, p.tokens, p.offsets, p.category_weights)
    memory = [*((x, False) for x in read), *((x, True) for x in (out, maps, scratch))]
    cuda.announce([(*memory_of(x), writable) for x, writable in memory if x is not None and x.numel()])
    arguments = (
        tuple(x.data_ptr() for x in (p.q, p.k, p.v, out)),
        name,
        shape,
        tuple((x.stride(0) if x.shape[0] > 1 else 0, x.stride(1)) for x in (p.q, p.k, p.v)),
        None if maps is None else (maps.data_ptr(), name_of(maps.dtype), maps.stride()),
        None if addend is None else (addend.data_ptr(), addend.stride()),
        None
        if case.categories is None
        else (*(x.data_ptr() for x in (p.tokens, p.offsets, p.category_weights)), p.matrix.shape[1]),
        case.average,
        p.scale,
        p.weight,
        schedule,
    )
    if warpgroups is None:
        cuda.cross_attention_maps(*arguments, scratch.data_ptr() if scratch_bytes else 0, 0, 0)
    else:
        cuda.cross_attention_maps_wgmma(*arguments, warpgroups, 0, 0)
    if maps is not None and maps._base is not None:  # what lies between the maps stays as it was
        assert maps._base.isnan().sum() == maps._base.numel() - maps.numel() + maps.isnan().sum()
    return out, maps


def check(p: Problem, out: torch.Tensor, maps: torch.Tensor | None) -> None:
    """Compares with float64, within what rounding explains.

    A logit is a sum of D products, scaled by scale * log2(e) and reduced by the largest: each step rounds once,
    relative to the sum of the sizes of the products. 2^x is within 2 units in the last place. So a probability has a
    relative error of twice (numerator and denominator) the logit's, plus those and its sum's L. `out` adds the rounding
    of P and of itself to 16 bits, and that probabilities below the smallest 16-bit number vanish.
    """
    case, unit = p.case, ROUNDOFF[torch.float32]
    q, k, v = (x.double().unflatten(-1, (case.heads, case.dim)).transpose(1, 2) for x in (p.q, p.k, p.v))
    probabilities = torch.softmax(q @ k.mT * p.scale, -1)
    logit_error = (case.dim + 4) * unit * abs(p.scale) * (q.abs() @ k.abs().mT).amax(-1, keepdim=True)
    relative = 2 * torch.expm1(logit_error) + (case.length + 8) * unit

    expected, size = probabilities @ v, probabilities @ v.abs()
    narrow, tiny = ROUNDOFF[case.dtype], SMALLEST[case.dtype]
    budget = size * (relative + narrow * 1.01 + case.length * unit) + expected.abs() * narrow * 1.01
    budget = budget + tiny * (1 + v.abs().sum(-2, keepdim=True))
    actual = out.double().unflatten(-1, (case.heads, case.dim)).transpose(1, 2)
    assert ((actual - expected).abs() <= budget).all(), ((actual - expected).abs() / budget).max()
    if maps is None:
        return

    def reduced(x: torch.Tensor) -> torch.Tensor:
        return (x.mean(1, keepdim=True) if case.average else x) @ p.matrix * p.weight

    relative = relative + (case.heads + case.length + 4) * unit  # the sums over heads and tokens
    expected, error = reduced(probabilities), reduced(probabilities * relative)
    if p.addend is not None:
        expected = expected + p.addend
    narrow, tiny = ROUNDOFF[maps.dtype], SMALLEST[maps.dtype]
    budget = error + expected.abs() * (narrow + unit) * 1.01 + tiny
    assert ((maps.double() - expected).abs() <= budget).all(), ((maps.double() - expected).abs() / budget).max()


def run_and_check(cuda, case: Case, schedule: str = "auto", device: Device = H200) -> None:
    p = make_problem(case)
    check(p, *run(cuda, p, schedule, device))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 2, 40, 48, 49, 77, 80, 81, 150, 160])
def test_tokens(cuda, length: int, dtype: torch.dtype, schedule: str) -> None:
    run_and_check(cuda, Case(length=length, dtype=dtype), schedule)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [48, 64, 80, 128, 160])
@pytest.mark.parametrize("length", [48, 80, 160, 256])
def test_every_kernel(cuda, length: int, dim: int, dtype: torch.dtype) -> None:
    case = Case(n=40, length=length, dim=dim, dtype=dtype, heads=2)
    for device in (H200, A100, L40):  # where there is less shared memory, tiles have fewer rows, and v replaces k
        if (length, dim, device) != (256, 160, L40):  # refused
            run_and_check(cuda, case, device=device)
    run_and_check(cuda, replace(case, length=length - 9, dim=dim - 8), "heads_loop")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 32, 33, 64, 65, 130])
def test_queries(cuda, n: int, schedule: str) -> None:
    run_and_check(cuda, Case(n=n, heads=2), schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("heads", [1, 2, 3, 5, 8, 9, 20])
def test_heads(cuda, heads: int, schedule: str) -> None:
    run_and_check(cuda, Case(heads=heads, dim=8, n=20), schedule)


@pytest.mark.parametrize("processors", [1, 4, 8, 16])
@pytest.mark.parametrize("schedule", ["cluster", "split"])
def test_heads_in_groups_of_several(cuda, processors: int, schedule: str) -> None:
    """With fewer processors, fewer blocks share the heads of a tile."""
    run_and_check(cuda, Case(heads=8, dim=8, n=70, batch=2), schedule, Device(processors))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shared_tokens", [False, True])
def test_batch(cuda, shared_tokens: bool, schedule: str) -> None:
    run_and_check(cuda, Case(n=35, batch=3, shared_tokens=shared_tokens), schedule)


TOKENS_OF_WORDS = (*(number // 3 for number in range(30)), -1, 4, 4, -1, 0, 9, 2, 2, -1, 3)
FORMS = {
    "a layer's": {},
    "accumulated": {"addend": "same"},
    "added to another tensor": {"addend": "separate"},
    "a slice of features": {"layout": "channels_first", "maps_dtype": torch.bfloat16, "addend": "separate"},
    "a slice of features, accumulated": {"layout": "channels_first", "addend": "same"},
    "a slice of channels-last features": {"layout": "pitched", "maps_dtype": torch.float16},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("average", [True, False], ids=["averaged", "each head"])
@pytest.mark.parametrize(
    "categories", [None, TOKENS_OF_WORDS, (-1,) * 40], ids=["tokens", "categories", "no categories"]
)
@pytest.mark.parametrize("form", list(FORMS))
def test_forms_of_maps(cuda, form: str, categories: tuple[int, ...] | None, average: bool, schedule: str) -> None:
    run_and_check(cuda, Case(batch=2, categories=categories, average=average, **FORMS[form]), schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_maps(cuda, schedule: str) -> None:
    run_and_check(cuda, Case(maps_dtype=None), schedule)


@pytest.mark.parametrize("case", [Case(spread=1e4), Case(spread=1e4, dtype=torch.float16, scale=-3.0), Case(scale=0.0)])
def test_extreme_logits(cuda, case: Case) -> None:
    p = make_problem(case)
    out, maps = run(cuda, p)
    assert out.isfinite().all()
    assert maps.sum(-1).sub(p.weight).abs().max() < 1e-5
    if case.spread == 1:
        check(p, out, maps)


def test_nan_stays_in_its_row(cuda) -> None:
    p = make_problem(Case())
    expected = run(cuda, p)
    p.q[0, 5, 3] = float("nan")
    for x, y in zip(run(cuda, p), expected, strict=True):
        rows = (x != y).transpose(1, 2).flatten(2).any(-1) if x.dim() == 4 else (x != y).any(-1)
        assert rows.nonzero()[:, 1].tolist() == [5]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("length", [150, 200])
def test_results_do_not_depend_on_the_order_of_threads(cuda, length: int, schedule: str) -> None:
    p = make_problem(Case(length=length, heads=8, categories=tuple(i % 7 - 1 for i in range(length)), addend="same"))
    for device in (H200, L40):
        if schedule == "cluster" and device.major < 9:
            continue
        first, *others = (run(cuda, p, schedule, device._replace(order=order)) for order in range(4))
        for other in others:
            assert all(itertools.starmap(torch.equal, zip(first, other, strict=True)))


@pytest.mark.parametrize(
    ("device", "tiles", "launches"), [(A100, 1, 2), (A100, 54, 1), (A100, 108, 1), (H200, 1, 1), (H200, 132, 1)]
)
def test_automatic_schedule(cuda, device: Device, tiles: int, launches: int) -> None:
    """Only the split schedule has a second kernel."""
    p = make_problem(Case(n=64 * tiles, heads=8, dim=8, length=2))
    cuda.launches()
    check(p, *run(cuda, p, "auto", device))
    assert cuda.launches() == launches


@pytest.mark.parametrize(
    ("change", "device", "message"),
    [
        ({"length": 257}, H200, "more than 256 tokens"),
        ({"dim": 168}, H200, "more than 160 elements"),
        ({"dim": 20}, H200, "not a multiple of 8"),
        ({"dtype": torch.float32}, H200, "must be bfloat16 or float16"),
        ({}, A100, "has no clusters"),
        ({"length": 256, "dim": 160}, L40, "too little shared memory"),
    ],
)
def test_what_it_cannot_run(cuda, change: dict, device: Device, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(cuda, make_problem(replace(Case(), **change)), "auto" if device is L40 else "cluster", device)


@pytest.mark.parametrize("change", [{"schedule": "fastest"}, {"dtype": "int8"}])
def test_unknown_names_are_refused(cuda, change: dict) -> None:
    cuda.configure(132, 9, 227 << 10, 0)
    arguments = {"dtype": "bfloat16", "shape": (1, 64, 40, 8, 40), "maps": True, "average_heads": True}
    arguments |= {"schedule": "auto", "device": 0}
    assert cuda.cross_attention_maps_scratch(**arguments) == 0
    with pytest.raises(ValueError, match=next(iter(change.values()))):
        cuda.cross_attention_maps_scratch(**arguments | change)


@pytest.mark.parametrize("tensor", ["q", "k", "v"])
def test_misaligned_tensors_are_refused(cuda, tensor: str) -> None:
    p = make_problem(Case())
    setattr(p, tensor, getattr(p, tensor)[..., 4:])
    with pytest.raises(ValueError, match="not a multiple of 16 bytes"):
        run(cuda, p)
    x = getattr(make_problem(Case()), tensor)
    wide = torch.zeros(*x.shape[:-1], x.shape[-1] + 4, dtype=x.dtype)
    setattr(p, tensor, wide[..., : x.shape[-1]])
    with pytest.raises(ValueError, match="not a multiple of 8 elements"):
        run(cuda, p)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"n": 0}])
def test_empty(cuda, sizes: dict) -> None:
    cuda.launches()
    run(cuda, make_problem(replace(Case(), **sizes)))
    assert cuda.launches() == 0


@pytest.mark.parametrize("dim", [8, 12, 80, 160, 168])
@pytest.mark.parametrize("tokens", [2, 256, 257])
def test_sizes_that_are_refused_are_known_without_the_kernels(cuda, tokens: int, dim: int) -> None:
    """By what decides which cases a GPU would run."""
    cuda.configure(*H200)
    sizes, refused = (1, 20, tokens, 2, dim), []
    for ask in (
        lambda: cuda.cross_attention_maps_scratch("bfloat16", sizes, True, True, "auto", 0),
        lambda: attention_scratch(SimpleNamespace(sizes=sizes)),
    ):
        try:
            ask()
            refused.append(False)
        except ValueError:
            refused.append(True)
    assert refused[0] == refused[1]
