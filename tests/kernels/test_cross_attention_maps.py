"""The Triton kernels of cross_attention_maps against a float64 oracle: on a GPU, or in Triton's interpreter on the CPU.

Budgets: twice the error that eager PyTorch makes in the same precision, plus a rounding band (`band`). Outputs start as
NaN, so what is not written shows.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

if "triton" not in sys.modules and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels are interpreted or compiled as decided when defined
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from vpd_fast.kernels import cross_attention_maps, cross_attention_maps_backward  # noqa: E402
from vpd_fast.kernels._attention import split  # noqa: E402
from vpd_fast.kernels._common import INTERPRETED, rounded  # noqa: E402
from vpd_fast.kernels.recording import recording  # noqa: E402

DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            not INTERPRETED.value, reason="interpreted only without a GPU; with one, 'cuda' checks the same"
        ),
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
WEIGHT = 0.7


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@dataclass
class Case:
    """Arguments of one call. texts: 1, or as many as images. ids: categories of the tokens, or None."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    heads: int
    ids: torch.Tensor | None = None
    count: int = 0
    reduce: str = "mean"
    average_heads: bool = True

    @property
    def scale(self) -> float:
        return (self.q.shape[2] // self.heads) ** -0.5

    @property
    def map_shape(self) -> tuple[int, ...]:
        heads = () if self.average_heads else (self.heads,)
        return (self.q.shape[0], *heads, self.q.shape[1], self.k.shape[1] if self.ids is None else self.count)

    def category_weights(self) -> torch.Tensor:
        counts = torch.bincount(self.ids[self.ids >= 0], minlength=self.count)
        return (counts > 0) / counts.clamp(min=1) if self.reduce == "mean" else (counts > 0).float()

    def options(self) -> dict:
        categories = None
        if self.ids is not None:
            order = torch.sort(self.ids, stable=True).indices
            counts = torch.bincount(self.ids[self.ids >= 0], minlength=self.count)
            categories = SimpleNamespace(
                ids=self.ids.int(),
                weights=self.category_weights().float(),
                tokens=order[self.ids[order] >= 0].int(),
                offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int(),
                count=self.count,
            )
        options = {"heads": self.heads, "scale": self.scale, "weight": WEIGHT, "categories": categories}
        return options | {"average_heads": self.average_heads}

    def eager(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output, maps and scores, in the precision of the arguments."""
        images = q.shape[0]
        q, k, v = (x.expand(images, -1, -1).unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.mT * self.scale
        probabilities = scores.softmax(-1)
        out = (probabilities @ v).transpose(1, 2).flatten(2)
        maps = probabilities.mean(1) if self.average_heads else probabilities
        if self.ids is not None:
            members = torch.arange(self.count, device=self.ids.device) == self.ids[:, None]
            maps = maps @ (members * self.category_weights()).to(maps.dtype)
        return out, WEIGHT * maps, scores


def make_case(
    dim: int,
    tokens: int,
    rows: int,
    heads: int,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    images: int = 2,
    texts: int = 1,
    magnitude: float = 1.0,
    **options,
) -> Case:
    generator = torch.Generator(device).manual_seed(dim * tokens + rows)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    q = tensor(images, rows, heads * dim) * magnitude
    return Case(q, tensor(texts, tokens, heads * dim), tensor(texts, tokens, heads * dim), heads, **options)


def band(scores: torch.Tensor, dtype: torch.dtype) -> float:
    """Relative rounding band of a result: float32 arithmetic, then one rounding to the type of the result.

    A score has an error of a few units in the last place (its sum, the folded factor scale * log2(e), the product); as
    exponents they are relative errors of the probability. Exponential, sum, inverse and products add some more.
    """
    float32 = 2.0**-24 * (8 + 4 * scores.abs().max().item())
    return float32 + torch.finfo(dtype).eps / 2 * (dtype != FLOAT32)


def assert_close(result: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor, scores: torch.Tensor) -> None:
    assert result.isfinite().all()
    budget = 2 * (eager.double() - exact).abs().max().item() + band(scores, result.dtype) * exact.abs().max().item()
    assert (result.double() - exact).abs().max().item() <= budget


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def run_and_check(case: Case, one_pass: bool | None = None) -> None:
    """Maps are compared with float32 eager PyTorch on the same inputs, whatever their type."""
    device = case.q.device.type
    out, maps = poisoned(tuple(case.q.shape), case.q.dtype, device), poisoned(case.map_shape, FLOAT32, device)
    cross_attention_maps.forward(case.q, case.k, case.v, out, maps, None, **case.options(), one_pass=one_pass)
    exact_out, exact_maps, scores = case.eager(case.q.double(), case.k.double(), case.v.double())
    assert_close(out, exact_out, case.eager(case.q, case.k, case.v)[0], scores)
    assert_close(maps, exact_maps, case.eager(case.q.float(), case.k.float(), case.v.float())[1], scores)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(2, (16, 0)), (16, (16, 0)), (17, (32, 0)), (33, (32, 16)), (40, (32, 16)), (77, (64, 16)), (80, (64, 16)),
     (129, (128, 16)), (150, (128, 32)), (160, (128, 32)), (200, (256, 0)), (256, (256, 0)), (600, (512, 128))],
)  # fmt: skip
def test_split(size: int, expected: tuple[int, int]) -> None:
    assert split(size) == expected


def test_rounding_to_bfloat16_is_the_hardware_s(device: str) -> None:
    @triton.jit
    def kernel(x, y, N: tl.constexpr):
        place = tl.arange(0, N)
        tl.store(y + place, rounded(tl.load(x + place), tl.bfloat16))

    x = torch.randn(4096, device=device) * torch.logspace(-30, 30, 4096, device=device)
    x[:4] = torch.tensor([0.0, float("inf"), -float("inf"), 1 + 2.0**-8])
    y = torch.empty(4096, dtype=BFLOAT16, device=device)
    kernel[(1,)](x, y, 4096)
    assert torch.equal(y, x.bfloat16())


# head dimension, tokens, rows, heads, dtype, texts
SHAPES = [
    (8, 2, 5, 1, FLOAT32, 1),
    (8, 7, 70, 8, BFLOAT16, 1),
    (20, 16, 64, 4, FLOAT16, 2),
    (40, 33, 65, 2, BFLOAT16, 1),
    (40, 40, 33, 8, BFLOAT16, 2),
    (40, 77, 70, 2, FLOAT32, 1),
    (40, 77, 70, 3, BFLOAT16, 2),  # rows of 120: two passes, see `one_pass_refuses`
    (40, 77, 70, 4, BFLOAT16, 2),
    (64, 77, 16, 2, FLOAT16, 1),
    (80, 40, 65, 2, BFLOAT16, 1),
    (80, 150, 33, 2, BFLOAT16, 1),
    (160, 40, 10, 2, BFLOAT16, 1),
    (160, 77, 33, 1, FLOAT32, 1),
    (160, 256, 17, 1, FLOAT16, 2),
    (40, 300, 33, 2, BFLOAT16, 1),
    (20, 600, 20, 1, FLOAT32, 1),
]


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple, one_pass: bool, device: str) -> None:
    *sizes, texts = shape
    run_and_check(make_case(*sizes, texts=texts, device=device), one_pass)


@pytest.mark.parametrize(
    ("heads", "dim", "tokens", "dtype", "reason"),
    [
        (4, 40, 77, BFLOAT16, None),
        (3, 40, 77, BFLOAT16, "rows are 120 elements apart, no multiple of 16"),
        (2, 40, 77, FLOAT32, "q is float32"),
        (2, 80, 77, BFLOAT16, "are 160 columns together"),
    ],
)
def test_what_one_pass_refuses(heads: int, dim: int, tokens: int, dtype: torch.dtype, reason: str | None) -> None:
    q, k = (torch.empty(1, rows, heads * dim, dtype=dtype, device="meta") for rows in (64, tokens))
    refused, launched = cross_attention_maps.one_pass_refuses(q, k, k, heads), []
    assert refused is None if reason is None else reason in refused
    maps = torch.empty(1, 64, tokens, device="meta")
    options = {"heads": heads, "scale": 0.1, "weight": 1.0, "categories": None, "average_heads": True}
    with recording(lambda kernel, *_: launched.append(kernel)):
        cross_attention_maps.forward(q, k, k, q, maps, None, **options, one_pass=True)
    assert len(launched) == (1 if reason is None else 2)


IDS = {  # -1: no category; some categories stay empty
    40: torch.tensor([0, 3, 3, -1, 5, 18, 2, 2, 0, 0] * 4),
    77: torch.arange(77) % 17 * 2 % 19,
    300: torch.arange(300).flip(0) % 23 - 1,
}


@pytest.mark.parametrize("average_heads", [True, False])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize(
    ("tokens", "count", "one_pass"), [(40, 20, True), (40, 40, False), (77, 20, True), (300, 70, False)]
)
def test_categories(tokens: int, count: int, one_pass: bool, reduce: str, average_heads: bool, device: str) -> None:
    options = {"ids": IDS[tokens].to(device), "count": count, "reduce": reduce, "average_heads": average_heads}
    run_and_check(make_case(20, tokens, 33, 4, BFLOAT16, device=device, **options), one_pass)


def test_no_token_has_a_category(device: str) -> None:
    for one_pass in (True, False):
        ids = torch.full((7,), -1, device=device)
        case = make_case(20, 7, 9, 4, FLOAT16, device=device, ids=ids, count=3)
        out, maps = torch.empty_like(case.q), poisoned(case.map_shape, FLOAT32, device)
        cross_attention_maps.forward(case.q, case.k, case.v, out, maps, None, **case.options(), one_pass=one_pass)
        assert (maps == 0).all()


@pytest.mark.parametrize("one_pass", [True, False])
def test_maps_per_head(one_pass: bool, device: str) -> None:
    run_and_check(make_case(40, 77, 33, 2, BFLOAT16, device=device, average_heads=False), one_pass)


def test_no_maps(device: str) -> None:
    case = make_case(40, 77, 33, 2, BFLOAT16, device=device)
    outs = [poisoned(tuple(case.q.shape), BFLOAT16, device) for _ in range(2)]
    maps = torch.empty(case.map_shape, device=device)
    cross_attention_maps.forward(case.q, case.k, case.v, outs[0], None, None, **case.options())
    cross_attention_maps.forward(case.q, case.k, case.v, outs[1], maps, None, **case.options(), one_pass=False)
    assert torch.equal(*outs)


def map_memory(layout: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    """A buffer of NaN, and maps as a part of it."""
    images, rows, columns = shape
    if layout == "channels first":
        buffer = poisoned((images, columns + 5, rows), dtype, device)
        return buffer, buffer[:, 3 : 3 + columns].mT
    buffer = poisoned((images, rows, columns + 11), dtype, device)
    return buffer, buffer[..., 4 : 4 + columns]


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
@pytest.mark.parametrize("layout", ["channels first", "channels last, padded"])
def test_maps_in_a_slice_of_features(layout: str, dtype: torch.dtype, one_pass: bool, device: str) -> None:
    case = make_case(20, 40, 33, 4, FLOAT16, device=device)
    buffer, maps = map_memory(layout, case.map_shape, dtype, device)
    addend_buffer, addend = map_memory(layout, case.map_shape, FLOAT32, device)
    addend.copy_(torch.rand(case.map_shape, device=device))
    out = torch.empty_like(case.q)
    cross_attention_maps.forward(case.q, case.k, case.v, out, maps, addend, **case.options(), one_pass=one_pass)
    _, exact, scores = case.eager(case.q.double(), case.k.double(), case.v.double())
    _, eager, _ = case.eager(case.q.float(), case.k.float(), case.v.float())
    assert_close(maps, exact + addend.double(), (eager + addend), scores)
    maps.fill_(float("nan"))
    assert buffer.isnan().all()  # nothing beside the slice was written
    assert addend_buffer.isnan().sum() == buffer.numel() - maps.numel()


@pytest.mark.parametrize("categories", [False, True])
@pytest.mark.parametrize("one_pass", [True, False])
def test_accumulating_in_place(one_pass: bool, categories: bool, device: str) -> None:
    options = {"ids": IDS[40].to(device), "count": 20} if categories else {}
    case = make_case(20, 40, 65, 4, BFLOAT16, device=device, **options)
    addend = torch.rand(case.map_shape, device=device)
    apart, in_place, out = poisoned(case.map_shape, FLOAT32, device), addend.clone(), torch.empty_like(case.q)
    for maps, before in ((apart, addend), (in_place, in_place)):
        cross_attention_maps.forward(case.q, case.k, case.v, out, maps, before, **case.options(), one_pass=one_pass)
    assert torch.equal(apart, in_place)
    assert not torch.equal(apart, addend)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values as a part of a larger buffer of NaN."""
    images, rows, width = x.shape
    buffer = poisoned((rows, images, width + 24), x.dtype, x.device.type)
    buffer[..., 8 : 8 + width] = x.transpose(0, 1)
    return buffer[..., 8 : 8 + width].transpose(0, 1)


@pytest.mark.parametrize("one_pass", [True, False])
def test_strides_of_inputs_do_not_matter(one_pass: bool, device: str) -> None:
    case = make_case(20, 33, 65, 4, BFLOAT16, device=device, texts=2)
    results = []
    for q, k, v in ((case.q, case.k, case.v), (strided(case.q), strided(case.k), strided(case.v))):
        out, maps = poisoned(tuple(q.shape), BFLOAT16, device), poisoned(case.map_shape, FLOAT32, device)
        cross_attention_maps.forward(q, k, v, out, maps, None, **case.options(), one_pass=one_pass)
        results.append((out, maps))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("one_pass", [True, False])
def test_huge_scores(one_pass: bool, dtype: torch.dtype, device: str) -> None:
    run_and_check(make_case(20, 40, 33, 4, dtype, device=device, magnitude=1e4), one_pass)


@pytest.mark.skipif(
    not INTERPRETED.value,
    reason="needs the interpreter (TRITON_INTERPRET=1): compiled kernels refuse CPU tensors first",
)
def test_what_is_refused() -> None:
    q, k = torch.empty(1, 1, 1).expand(2, 4, 257), torch.empty(1, 1, 1).expand(1, 8, 257)
    refuse = cross_attention_maps.refuse
    assert refuse(q[..., :256], k[..., :256], k[..., :256], 1) is None
    assert "257" in refuse(q, k, k, 1)
    far = torch.empty(1, 1, 1, device="meta").as_strided((1, 8, 256), (0, 2**28, 1))
    assert "k or v" in refuse(q[..., :256], k[..., :256], far, 1)
    assert "rows" in refuse(far, k[..., :256], k[..., :256], 1)


def run_backward(
    case: Case, grad_out: torch.Tensor | None, grad_maps: torch.Tensor | None, chunks: int | None = None
) -> tuple[torch.Tensor, ...]:
    gradients = tuple(poisoned(tuple(x.shape), x.dtype, x.device.type) for x in (case.q, case.k, case.v))
    cross_attention_maps_backward.backward(
        grad_out, grad_maps, case.q, case.k, case.v, *gradients, **case.options(), chunks=chunks
    )
    return gradients


def check_backward(
    case: Case, *, out: bool = True, maps: bool = True, chunks: int | None = None, layout: str | None = None
) -> None:
    """A result's size is that of the sums it is the difference of: errors are relative to the largest gradient."""
    device = case.q.device.type
    grad_out = torch.randn(case.q.shape, device=device).to(case.q.dtype) if out else None
    grad_maps = 3 * torch.randn(case.map_shape, device=device) if maps else None
    if layout:
        _, memory = map_memory(layout, case.map_shape, FLOAT32, device)
        grad_maps = memory.copy_(grad_maps)
    expected = []
    for dtype in (torch.float64, case.q.dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (case.q, case.k, case.v)]
        result, result_maps, scores = case.eager(*inputs)
        loss = (result * (grad_out.to(dtype) if out else 0)).sum()
        if maps:
            loss = loss + (result_maps * grad_maps.to(dtype)).sum()
        expected.append(torch.autograd.grad(loss, inputs))
    for gradient, exact, eager in zip(run_backward(case, grad_out, grad_maps, chunks), *expected, strict=True):
        assert_close(gradient, exact, eager, scores.detach())


# head dimension, tokens, rows, heads, dtype, texts, chunks
BACKWARD_SHAPES = [
    (8, 2, 5, 1, FLOAT32, 1, None),
    (8, 16, 65, 3, BFLOAT16, 2, None),
    (20, 33, 33, 2, FLOAT32, 1, 2),
    (20, 40, 70, 2, BFLOAT16, 1, 1),
    (40, 77, 33, 2, BFLOAT16, 1, None),
    (40, 40, 40, 2, FLOAT16, 2, 1),
    (80, 150, 33, 1, BFLOAT16, 1, 3),
    (160, 40, 17, 1, BFLOAT16, 1, 2),
    (160, 33, 20, 1, FLOAT32, 2, None),
    (8, 300, 20, 1, BFLOAT16, 1, None),
]


@pytest.mark.parametrize("shape", BACKWARD_SHAPES, ids=str)
def test_backward_shapes(shape: tuple, device: str) -> None:
    *sizes, texts, chunks = shape
    check_backward(make_case(*sizes, texts=texts, device=device), chunks=chunks)


@pytest.mark.parametrize(("out", "maps"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dim", [20, 160])
def test_backward_of_one_result(dim: int, out: bool, maps: bool, device: str) -> None:
    case = make_case(dim, 17, 20, 2, BFLOAT16, device=device, images=1)
    if out or maps:
        check_backward(case, out=out, maps=maps)
    else:
        assert all((gradient == 0).all() for gradient in run_backward(case, None, None))


@pytest.mark.parametrize("average_heads", [True, False])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_backward_of_categories(reduce: str, average_heads: bool, device: str) -> None:
    options = {"ids": IDS[40].to(device), "count": 20, "reduce": reduce, "average_heads": average_heads}
    check_backward(make_case(20, 40, 20, 2, FLOAT32, device=device, **options))


@pytest.mark.parametrize("layout", ["channels first", "channels last, padded"])
def test_backward_of_a_slice_of_features(layout: str, device: str) -> None:
    check_backward(make_case(20, 33, 20, 2, BFLOAT16, device=device), layout=layout)


def test_backward_of_huge_scores(device: str) -> None:
    check_backward(make_case(20, 33, 20, 1, FLOAT32, device=device, magnitude=1e4))


def test_two_runs_are_equal(device: str) -> None:
    case = make_case(20, 33, 40, 2, BFLOAT16, device=device)
    grad_out, grad_maps = torch.randn_like(case.q), torch.randn(case.map_shape, device=device)
    runs = []
    for _ in range(2):
        results = [poisoned(tuple(case.q.shape), BFLOAT16, device), poisoned(case.map_shape, FLOAT32, device)]
        cross_attention_maps.forward(case.q, case.k, case.v, *results, None, **case.options())
        runs.append([*results, *run_backward(case, grad_out, grad_maps)])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("tokens", [40, 77, 150, 847])
@pytest.mark.parametrize(("rows", "dim"), [(4096, 40), (1024, 80), (256, 160), (64, 160)])
def test_vpd_shapes(rows: int, dim: int, tokens: int, dtype: torch.dtype) -> None:
    case = make_case(dim, tokens, rows, 8, dtype, device="cuda")
    for one_pass in (True, False, None):
        run_and_check(case, one_pass)
    check_backward(case)


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    images, rows, heads, dim, tokens = 104, 16384, 8, 160, 17
    case = make_case(dim, tokens, rows, heads, BFLOAT16, device="cuda", images=images)
    assert case.q.numel() > 2**31
    out, maps = torch.empty_like(case.q), torch.empty(case.map_shape, device="cuda")
    cross_attention_maps.forward(case.q, case.k, case.v, out, maps, None, **case.options())
    last = make_case(dim, tokens, 1, heads, BFLOAT16, device="cuda")
    last.q, last.k, last.v = case.q[-1:], case.k, case.v
    exact_out, exact_maps, scores = last.eager(last.q.double(), last.k.double(), last.v.double())
    assert_close(out[-1:], exact_out, last.eager(last.q, last.k, last.v)[0], scores)
    assert_close(maps[-1:], exact_maps, last.eager(last.q.float(), last.k.float(), last.v.float())[1], scores)
