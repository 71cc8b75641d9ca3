"""The CUDA kernel of self_attention with wgmma: compiled for the CPU over an emulation, and on a GPU.

Tensors lie in poisoned memory and begin as poison; the emulation refuses every address that is not theirs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch

from vpd_fast import _native

from .devices import A100, H200, Device
from .test_cuda_emulation import ROUNDOFF, SMALLEST, memory_of, name_of, padded

ORDERS = ("sequential", "overlapped", "polynomial")
orders = pytest.mark.parametrize("order", ORDERS)
POLYNOMIAL = 1e-4  # relative error of the exponentials that are one
BF16, FP16 = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """Sizes and options of a call."""

    n: int = 70
    length: int = 150
    dim: int = 40
    heads: int = 2
    batch: int = 1
    dtype: torch.dtype = BF16
    shared: bool = False  # keys and values of all images
    scale: float | None = None
    spread: float = 1.0


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest) -> ModuleType:
    """The module that runs the kernels."""
    return request.getfixturevalue("cuda") if request.param == "emulated" else _native.load("_C_cuda")


Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make(case: Case) -> Tensors:
    """q, k and v with poison between their rows."""
    generator = torch.Generator().manual_seed(case.n + case.length)

    def random(*shape: int) -> torch.Tensor:
        return padded(shape, case.dtype).copy_(torch.randn(shape, generator=generator))

    width, images = case.heads * case.dim, 1 if case.shared else case.batch
    q, k, v = random(case.batch, case.n, width), *(random(images, case.length, width) for _ in range(2))
    return q.mul_(case.spread), k, v


def strides_of(x: torch.Tensor) -> tuple[int, int]:
    return x.stride(0) if x.shape[0] > 1 else 0, x.stride(1)


def run(
    machine: ModuleType,
    case: Case,
    qkv: Tensors,
    order: str = "auto",
    groups: int = 0,
    device: Device = H200,
    rounding: torch.Tensor | None = None,
) -> torch.Tensor:
    """out (B, N, heads * D), by a rounding in int8."""
    shape = case.batch, case.n, case.heads * case.dim
    out = padded(shape, case.dtype) if rounding is None else torch.zeros(shape, dtype=torch.int8)
    emulated = hasattr(machine, "configure")
    tensors = [*qkv, out]
    if emulated:
        machine.configure(device.processors, device.major, device.shared_limit, device.order)
        known = [*tensors, *([] if rounding is None else [rounding])]
        machine.announce([(*memory_of(x), x is out) for x in known if x.numel()])
    else:
        rounding = rounding if rounding is None else rounding.cuda()
        spans = [x.as_strided((memory_of(x)[1] // x.itemsize,), (1,)).cuda() for x in tensors]
        tensors = [span.as_strided(x.shape, x.stride(), 0) for span, x in zip(spans, tensors, strict=True)]
    machine.self_attention(
        tensors=[(x.data_ptr(), strides_of(x)) for x in tensors],
        dtype=name_of(case.dtype),
        shape=(case.batch, case.n, case.length, case.heads, case.dim),
        scale=scale_of(case),
        order=order,
        groups=groups,
        device=0,
        stream=0,
        rounding=(0, 0) if rounding is None else (rounding[0].data_ptr(), rounding[1].data_ptr()),
    )
    if not emulated:
        torch.cuda.synchronize()
        out.copy_(tensors[-1])
    assert out._base is None or out._base[..., out.shape[-1] :].isnan().all()
    return out


def scale_of(case: Case) -> float:
    return case.dim**-0.5 if case.scale is None else case.scale


def check(case: Case, qkv: Tensors, out: torch.Tensor, order: str = "auto") -> None:
    """Compares with float64, within what rounding explains.

    A score is a sum of D products, of which each step rounds once relative to the sum of their sizes (tensor cores
    cut, which is twice that); with the scale it is reduced by a reference that is the same for the whole row, rounded
    once. 2^x is within 2 units in the last place. What is added up before shrinks once per block of keys with an
    error of such an exponential, whose argument is rounded relative to the scores. So a probability has a relative
    error of twice (numerator and denominator) these, and the sum's of as many terms as there are keys. `out` adds the
    rounding of probabilities and of itself to 16 bits, and that probabilities below the smallest 16-bit number
    vanish.
    """
    unit, blocks = ROUNDOFF[torch.float32], -(-case.length // (128 if case.dim <= 80 else 64))
    q, k, v = (x.double().unflatten(-1, (case.heads, case.dim)).transpose(1, 2) for x in qkv)
    scale = scale_of(case)
    probabilities = torch.softmax(q @ k.mT * scale, -1)
    logit = (2 * case.dim + 4 + 2 * blocks) * unit * scale * (q.abs() @ k.abs().mT).amax(-1, keepdim=True)
    exponential = POLYNOMIAL if order == "polynomial" else 0.0  # beyond what is said above
    relative = 2 * exponential + 2 * torch.expm1(logit) + (2 * case.length + 8 + 6 * blocks) * unit
    expected, size = probabilities @ v, probabilities @ v.abs()
    narrow, tiny = ROUNDOFF[case.dtype], SMALLEST[case.dtype]
    budget = size * (relative + narrow * 1.01) + expected.abs() * narrow * 1.01
    budget = budget + tiny * (1 + v.abs().sum(-2, keepdim=True))
    actual = out.double().unflatten(-1, (case.heads, case.dim)).transpose(1, 2)
    assert ((actual - expected).abs() <= budget).all(), ((actual - expected).abs() / budget).max()


def run_and_check(machine: ModuleType, case: Case, order: str = "auto", groups: int = 0) -> None:
    qkv = make(case)
    check(case, qkv, run(machine, case, qkv, order, groups), order)


@pytest.mark.parametrize(("dim", "dtype"), [(40, BF16), (80, FP16), (160, BF16)])
def test_results_of_8_bits(machine: ModuleType, dim: int, dtype: torch.dtype) -> None:
    """Within a step of the 16-bit result, rounded: of 20 steps for a distance of 1, it is up to half a unit away."""
    case = Case(n=70, length=150, dim=dim, batch=2, dtype=dtype)
    qkv, generator = make(case), torch.Generator().manual_seed(0)
    factors = 20 + 20 * torch.rand(2 * dim, generator=generator)
    rounding = torch.stack([factors, torch.randint(-120, 120, (2 * dim,), generator=generator).float()])
    actual, plain = run(machine, case, qkv, rounding=rounding), run(machine, case, qkv)
    distance = (actual.float() - (plain.float() * rounding[0] + rounding[1]).clamp(-128, 127)).abs()
    assert (distance <= 0.501 + ROUNDOFF[dtype] * (plain.float() * rounding[0]).abs()).all()
    assert {-128, 127} <= set(actual.unique().tolist())


SIZES = [  # queries, keys, head dimension, warpgroups: one block of keys and more, full ones and not
    (1, 1, 40, 1),
    (64, 128, 40, 1),
    (65, 129, 40, 2),
    (130, 300, 40, 3),
    (70, 257, 80, 2),
    (33, 128, 80, 1),
    (70, 130, 160, 2),
    (64, 64, 160, 1),
    (20, 65, 8, 1),
    (20, 30, 48, 1),
    (20, 70, 128, 1),
]


@orders
@pytest.mark.parametrize(("n", "length", "dim", "groups"), SIZES)
def test_sizes(machine: ModuleType, n: int, length: int, dim: int, groups: int, order: str) -> None:
    if order == "polynomial" and dim > 40:
        order = "auto"
    heads = 1 if n > 64 else 2
    case = Case(n=n, length=length, dim=dim, heads=heads, dtype=FP16 if n == 20 else BF16)
    run_and_check(machine, case, order, groups)


@orders
@pytest.mark.parametrize("shared", [False, True])
def test_images(machine: ModuleType, shared: bool, order: str) -> None:
    run_and_check(machine, Case(n=40, length=70, batch=3, shared=shared), order)


@pytest.mark.parametrize(("processors", "groups"), [(1, 3), (5, 2), (132, 1)])
def test_blocks_fill_the_device(cuda: ModuleType, processors: int, groups: int) -> None:
    """As many warpgroups share what a block reads as leave no multiprocessor idle: 192 queries, or 128, or 64."""
    case = Case(n=190, length=30, dim=8, heads=3)
    device, qkv = H200._replace(processors=processors), make(case)
    shared = []
    for chosen in (0, groups):
        check(case, qkv, run(cuda, case, qkv, groups=chosen, device=device))
        shared.append(cuda.shared_bytes())
    assert shared[0] == shared[1]


@orders
@pytest.mark.parametrize("scale", [0.0, 1e-30, 3.0])
def test_scales(machine: ModuleType, scale: float, order: str) -> None:
    run_and_check(machine, Case(n=20, length=140, dim=8, scale=scale), order)


@orders
@pytest.mark.parametrize("factor", [2.0**10, 2.0**50, 2.0**60])
def test_huge_scores_do_not_overflow(machine: ModuleType, factor: float, order: str) -> None:
    """Exponents are then no longer one fma, whose reference is rounded by up to 2^96."""
    case = Case(n=20, length=140, dim=8)
    q, k, v = make(case)
    out = run(machine, case, (q.mul_(factor), k.mul_(factor), v), order)
    by_heads = [x.double().unflatten(-1, (2, -1)).transpose(1, 2) for x in (q, k, v)]
    scores = by_heads[0] @ by_heads[1].mT
    best = by_heads[2].gather(2, scores.argmax(-1)[..., None].expand(-1, -1, -1, 8))
    margin = scores.topk(2).values.diff(dim=-1).abs().squeeze(-1) / scores.abs().amax(-1)
    # Neither rounding nor a second key counts.
    clear = (margin > 2.0**-16) & (margin * scores.abs().amax(-1) > 40 * 8**0.5)
    assert clear.float().mean() > 0.5
    assert out.isfinite().all()
    actual = out.double().unflatten(-1, (2, -1)).transpose(1, 2)
    assert torch.equal(actual[clear], best[clear])


@orders
def test_the_largest_score_may_come_at_any_time(machine: ModuleType, order: str) -> None:
    """Also where scores leave, and come back to, the sizes for which an exponent is one fma."""
    case = Case(n=20, length=300, dim=8)
    for rise in (-3.0, 0.3, 30.0, 2.0**9):
        q, k, v = make(case)
        q[..., ::8] = 1.0
        k[..., ::8] = (rise * torch.arange(300)).to(k.dtype)[:, None]
        check(case, (q, k, v), run(machine, case, (q, k, v), order), order)


@orders
def test_what_is_not_finite_stays_where_it_matters(machine: ModuleType, order: str) -> None:
    case = Case(n=20, length=140, dim=8)
    q, k, v = make(case)
    expected = run(machine, case, (q, k, v), order)

    def require_the_rest(out: torch.Tensor) -> None:
        """Other rows of a warp then have exponents as of huge scores, which may flip a rounding."""
        assert (out - expected).double().norm() <= torch.finfo(BF16).eps * expected.double().norm()

    for special in (float("nan"), float("inf")):
        changed = q.clone()
        changed[0, 5, 3] = special  # of head 0
        out = run(machine, case, (changed, k, v), order)
        assert out[0, 5, :8].isnan().all()
        out[0, 5, :8] = expected[0, 5, :8]
        require_the_rest(out)
        changed = v.clone()
        changed[0, 139, 3] = special
        out = run(machine, case, (q, k, changed), order)
        assert not out[0, :, 3].isfinite().any()
        out[0, :, 3] = expected[0, :, 3]
        assert torch.equal(out, expected)
    changed = k.clone()
    changed[0, 0, 3] = -float("inf")  # in a block of its own with what is finite
    out = run(machine, case, (q, changed, v), order)[0, :, :8]
    assert torch.equal(out.isnan().all(-1), q[0, :, 3] < 0)
    assert torch.equal(out.isnan().any(-1), q[0, :, 3] < 0)


@pytest.mark.parametrize(("dim", "order"), [(40, order) for order in ORDERS] + [(160, order) for order in ORDERS[:2]])
def test_results_do_not_depend_on_the_order_of_threads(cuda: ModuleType, dim: int, order: str) -> None:
    """Warpgroups, copies and products come in the longest waiting's order, the last one's, and random ones."""
    case = Case(n=100, length=270, dim=dim, heads=1)
    qkv = make(case)
    first, *others = (run(cuda, case, qkv, order, 2, H200._replace(order=number)) for number in range(6))
    check(case, qkv, first, order)
    assert all(torch.equal(first, other) for other in others)


def test_equal_scores_give_the_mean(machine: ModuleType) -> None:
    case = Case(n=5, length=256, dim=8)
    q, k, v = make(case)
    v.copy_(torch.randint(-8, 8, v.shape, generator=torch.Generator().manual_seed(0)))  # whose sums are exact
    out = run(machine, case, (q.zero_(), k, v))
    assert torch.equal(out, v.double().mean(1, keepdim=True).to(BF16).expand_as(out))


@pytest.mark.parametrize(
    ("change", "device", "message"),
    [
        ({"dim": 168}, H200, "more than 160 elements"),
        ({"dim": 20}, H200, "not a multiple of 8"),
        ({"dim": 48, "order": "polynomial"}, H200, "up to 40 elements"),
        ({"scale": -1.0}, H200, "the scale is negative"),
        ({"dtype": torch.float32}, H200, "must be bfloat16 or float16"),
        ({}, A100, "no wgmma"),
        ({}, H200._replace(major=10), "no wgmma"),
    ],
)
def test_what_it_cannot_run(cuda: ModuleType, change: dict, device: Device, message: str) -> None:
    order = change.get("order", "auto")
    case = replace(Case(), **{name: value for name, value in change.items() if name != "order"})
    with pytest.raises(ValueError, match=message):
        run(cuda, case, make(case), order, device=device)


def test_unknown_names_are_refused(cuda: ModuleType) -> None:
    with pytest.raises(ValueError, match="order 'fast' is not"):
        run(cuda, Case(), make(Case()), "fast")
    with pytest.raises(RuntimeError, match="invalid argument"):
        run(cuda, Case(dim=80), make(Case(dim=80)), groups=3)


@pytest.mark.parametrize("tensor", [0, 1, 2])
def test_rows_that_tma_cannot_read_are_refused(cuda: ModuleType, tensor: int) -> None:
    qkv = list(make(Case()))
    good = qkv[tensor]
    wide = torch.zeros(*good.shape[:-1], good.shape[-1] + 4, dtype=good.dtype)
    for bad, message in (
        (good[..., 4:], "not a multiple of 16 bytes"),
        (wide[..., : good.shape[-1]], "not a multiple of 8 elements"),
        (good[:, :1].expand_as(good), "rows that share memory"),
    ):
        qkv[tensor] = bad
        with pytest.raises(ValueError, match=message):
            run(cuda, Case(), tuple(qkv))


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"n": 0}])
def test_empty(cuda: ModuleType, sizes: dict) -> None:
    cuda.launches()
    run(cuda, replace(Case(), **sizes), make(replace(Case(), **sizes)))
    assert cuda.launches() == 0
