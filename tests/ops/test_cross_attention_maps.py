"""cross_attention_maps against float64, for every implementation and instruction set level."""

from __future__ import annotations

import threading

import pytest
import torch

from vpd_fast import ops
from vpd_fast.errors import InputError

from .attention_cases import (
    assert_close,
    check_forward,
    eager,
    error,
    gradient_inputs,
    implementation_params,
    kernel_and_place,
    make_qkv,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=implementation_params())
def where(request, monkeypatch) -> dict:
    """{"impl", "device", "dtype"}: every implementation, the CPU kernel once per instruction set level."""
    return kernel_and_place(request, monkeypatch)


def call_of(where: dict):
    def call(*args, **kwargs):
        return ops.cross_attention_maps(*args, **kwargs, impl=where["impl"])

    return call


@pytest.mark.parametrize("tokens", [2, 3, 7, 15, 16, 17, 40, 77, 150, 256, 300, 847, 4096])
def test_tokens(where, tokens: int) -> None:
    q, k, v = make_qkv(2, 19, tokens, 2, 8, dtype=where["dtype"], device=where["device"])
    check_forward(call_of(where), q, k, v, 2)


@pytest.mark.parametrize("dim", [1, 2, 3, 8, 20, 40, 64, 80, 81, 160, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_dims_and_dtypes(where, dim: int, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(2, 21, 18, 3, dim, dtype=dtype, device=where["device"])
    check_forward(call_of(where), q, k, v, 3)


@pytest.mark.parametrize("queries", [1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 100, 256])
def test_queries(where, queries: int) -> None:
    q, k, v = make_qkv(3, queries, 9, 2, 8, dtype=where["dtype"], device=where["device"])
    check_forward(call_of(where), q, k, v, 2)


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("shared", [False, True])
def test_heads_and_a_shared_context(where, heads: int, shared: bool) -> None:
    q, k, v = make_qkv(3, 35, 40, heads, 16, shared=shared, dtype=where["dtype"], device=where["device"])
    check_forward(call_of(where), q, k, v, heads)
    if not shared:  # and one image is the shared case with a batch of one
        check_forward(call_of(where), q[:1], k[:1], v[:1], heads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 256, 150, 8, 40), (1, 128, 77, 8, 80), (1, 64, 150, 8, 160), (2, 64, 40, 8, 160)]
)
def test_sizes_of_vpd(where, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = make_qkv(*shape, shared=True, dtype=dtype, device=where["device"])
    check_forward(call_of(where), q, k, v, 8)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize(("tokens", "count"), [(19, 5), (150, 7), (40, 60), (300, 3)])
@pytest.mark.parametrize("average_heads", [True, False])
def test_categories(where, reduce: str, tokens: int, count: int, average_heads: bool) -> None:
    q, k, v = make_qkv(2, 37, tokens, 4, 8, dtype=where["dtype"], device=where["device"])
    generator = torch.Generator().manual_seed(tokens)
    categories = torch.randint(-1, count - 1, (tokens,), generator=generator).to(where["device"])  # the last is empty
    categories[:2] = -1
    kwargs = {"categories": categories, "num_categories": count, "reduce": reduce, "average_heads": average_heads}
    _, maps = check_forward(call_of(where), q, k, v, 4, **kwargs)
    assert not maps[..., -1].any()  # empty: zero, not NaN


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(1, 64, 150, 8, 160), (1, 1024, 77, 8, 80), (2, 4096, 150, 8, 40), (3, 100, 40, 5, 64)]
)
@pytest.mark.parametrize(
    ("name", "schedule"),
    [("cuda", "heads_loop"), ("cuda", "cluster"), ("cuda", "split"), ("wgmma", "heads_loop"), ("wgmma", "cluster")],
)
def test_schedules_of_cuda_kernels(name: str, schedule: str, shape: tuple, dtype: torch.dtype, monkeypatch) -> None:
    """Each way in which CUDA C++ kernels share heads among blocks, twice with the same bits."""
    monkeypatch.setattr("vpd_fast.ops._attention.CUDA_SCHEDULE", schedule)
    if (schedule == "cluster" or name == "wgmma") and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters and wgmma need compute capability 9.0")
    q, k, v = make_qkv(*shape, shared=True, dtype=dtype, device="cuda")
    where = {"impl": name, "device": "cuda"}
    first = check_forward(call_of(where), q, k, v, shape[3])
    second = ops.cross_attention_maps(q, k, v, shape[3], impl=name)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_categories_as_a_sequence_and_changed_in_place(where) -> None:
    q, k, v = make_qkv(tokens=6, dtype=where["dtype"], device=where["device"])
    _, maps = ops.cross_attention_maps(q, k, v, 4, categories=[0, 0, 1, 1, 2, -1], impl=where["impl"])
    ids = torch.tensor([0, 0, 1, 1, 2, -1], dtype=torch.int32, device=where["device"])
    _, same = ops.cross_attention_maps(q, k, v, 4, categories=ids, num_categories=3, impl=where["impl"])
    assert torch.equal(maps, same)
    if where["device"] == "cpu":
        ids.numpy()[5] = 2  # what is remembered about a tensor must not outlive its values
    else:
        ids[5] = 2
    _, other = ops.cross_attention_maps(q, k, v, 4, categories=ids, num_categories=3, impl=where["impl"])
    assert not torch.equal(other, same)


def test_no_token_has_a_category(where) -> None:
    q, k, v = make_qkv(2, 37, 6, 4, 8, dtype=where["dtype"], device=where["device"])
    kwargs = {"categories": [-1] * 6, "num_categories": 2, "impl": where["impl"]}
    _, maps = ops.cross_attention_maps(q, k, v, 4, **kwargs)
    assert torch.equal(maps, torch.zeros_like(maps))


def test_every_head_alone_and_no_maps(where) -> None:
    q, k, v = make_qkv(2, 37, 23, 4, 8, dtype=where["dtype"], device=where["device"])
    out, heads = check_forward(call_of(where), q, k, v, 4, average_heads=False)
    assert heads.shape == (2, 4, 37, 23)
    no_maps = ops.cross_attention_maps(q, k, v, 4, need_maps=False, impl=where["impl"])
    assert torch.equal(no_maps[0], out)
    assert no_maps[1] is None


def test_mean_over_layers_on_the_fly(where) -> None:
    layers = [make_qkv(2, 37, 23, heads, 8, dtype=where["dtype"], device=where["device"]) for heads in (2, 4, 8)]
    total = None
    for (q, k, v), heads in zip(layers, (2, 4, 8), strict=True):
        _, total = ops.cross_attention_maps(q, k, v, heads, weight=1 / 3, addend=total, impl=where["impl"])
    exact = [eager(*(x.double() for x in layer), heads)[1] for layer, heads in zip(layers, (2, 4, 8), strict=True)]
    plain = [eager(*layer, heads)[1] for layer, heads in zip(layers, (2, 4, 8), strict=True)]
    assert_close(total, sum(plain) / 3, sum(exact) / 3, torch.float32)


def test_a_strided_addend(where) -> None:
    q, k, v = make_qkv(2, 37, 23, 4, 8, dtype=where["dtype"], device=where["device"])
    addend = torch.randn(2, 46, 37, device=where["device"]).transpose(1, 2)[:, :, ::2]
    check_forward(call_of(where), q, k, v, 4, weight=0.25, addend=addend)


@pytest.mark.parametrize("scale", [0.05, 1.0, -0.3, 0.0])
def test_scale(where, scale: float) -> None:
    q, k, v = make_qkv(2, 37, 23, 4, 8, dtype=where["dtype"], device=where["device"])
    check_forward(call_of(where), q, k, v, 4, scale=scale)


def test_strides_do_not_matter(where) -> None:
    q, k, v = make_qkv(2, 37, 23, 4, 8, dtype=where["dtype"], device=where["device"])
    expected = call_of(where)(q, k, v, 4)
    fused = torch.cat([k, v], dim=-1)
    variants = {
        "chunks of one projection": (q, *fused.chunk(2, dim=-1)),
        "sequence first": tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)),
        "channels first": tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)),
        "every second": tuple(x.repeat_interleave(2, dim=2)[:, :, ::2] for x in (q, k, v)),
    }
    # Libraries of matrix products choose their loops by the strides; kernels do not. Two orders of the same sums over 8
    # channels and 23 tokens differ by 2 * 31 roundings of 2^-24, 4e-6 of the terms, which may cancel.
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if where["impl"] == "reference" else {"rtol": 0, "atol": 0}
    for name, tensors in variants.items():
        for actual, tidy in zip(call_of(where)(*tensors, 4), expected, strict=True):
            torch.testing.assert_close(actual, tidy, **tolerance, msg=name)
    same = k[:1].expand(2, -1, -1), v[:1].expand(2, -1, -1)
    for actual, shared in zip(call_of(where)(q, *same, 4), call_of(where)(q, k[:1], v[:1], 4), strict=True):
        torch.testing.assert_close(actual, shared, **tolerance)


def test_one_token_is_a_constant() -> None:
    q, k, v = make_qkv(2, 5, 1, 4, 8)
    assert ops.explain("cross_attention_maps", q, k, v, 4)["constant"] == "ok"
    out, maps = ops.cross_attention_maps(q, k, v, 4, weight=0.5)
    assert torch.equal(out, v.expand_as(q))
    assert torch.equal(maps, torch.full((2, 5, 1), 0.5))
    _, maps = ops.cross_attention_maps(q, k, v, 4, categories=[-1], num_categories=2, average_heads=False)
    assert torch.equal(maps, torch.zeros(2, 4, 5, 2))
    with pytest.raises(InputError, match="impl='constant' .* cannot run here: there are 19 tokens, not one"):
        ops.cross_attention_maps(*make_qkv(), 4, impl="constant")


def test_one_token_by_every_kernel(where) -> None:
    q, k, v = make_qkv(2, 5, 1, 4, 8, dtype=where["dtype"], device=where["device"])
    check_forward(call_of(where), q, k, v, 4)


def test_empty(where) -> None:
    q, k, v = make_qkv(2, 5, 3, 4, 8, dtype=where["dtype"], device=where["device"])
    for query, context in ((q[:0], k[:1]), (q[:, :0], k)):
        out, maps = ops.cross_attention_maps(query, context, context, 4, impl=where["impl"])
        assert out.shape == query.shape
        assert maps.shape == (*query.shape[:2], 3)


def test_huge_scores_do_not_overflow(where) -> None:
    q, k, v = make_qkv(2, 37, 23, 4, 8, dtype=where["dtype"], device=where["device"])
    limit = 1e-3 + torch.finfo(q.dtype).eps
    for factor in (2.0**10, 2.0**50, 2.0**60):  # exact in every dtype
        out, maps = ops.cross_attention_maps(q * factor, k * factor, v, 4, impl=where["impl"])
        exact_out, exact_maps = eager(q.double(), k.double(), v.double(), 4, scale=factor**2 * 8**-0.5)
        assert maps.isfinite().all()
        # So large scores leave one token, but for near ties, which rounding decides.
        assert error(maps, exact_maps) < limit
        assert error(out, exact_out) < limit


def test_nan_stays_in_its_row_and_infinite_queries_are_nan(where) -> None:
    q, k, v = make_qkv(2, 37, 23, 4, 8, dtype=where["dtype"], device=where["device"])
    out, maps = ops.cross_attention_maps(q, k, v, 4, impl=where["impl"])
    for special in (float("nan"), float("inf")):
        changed = q.clone()
        changed[1, 20, 9] = special  # head 1
        new_out, new_maps = ops.cross_attention_maps(changed, k, v, 4, impl=where["impl"])
        assert new_maps[1, 20].isnan().all()
        assert new_out[1, 20, 8:16].isnan().all()
        rest = torch.ones(2, 37, dtype=torch.bool)
        rest[1, 20] = False
        assert torch.equal(new_maps[rest], maps[rest])
        assert torch.equal(new_out[rest], out[rest])


def test_equal_probabilities_are_exact(where) -> None:
    q, k, v = make_qkv(1, 20, 64, 4, 8, dtype=where["dtype"], device=where["device"])
    _, maps = ops.cross_attention_maps(torch.zeros_like(q), k, v, 4, impl=where["impl"])
    assert torch.equal(maps, torch.full_like(maps, 1 / 64))


def test_two_runs_are_equal_bit_for_bit(where) -> None:
    for shape in ((2, 100, 150, 8, 40), (1, 37, 300, 3, 20)):
        q, k, v = make_qkv(*shape, dtype=where["dtype"], device=where["device"])
        first, second = (ops.cross_attention_maps(q, k, v, shape[3], impl=where["impl"]) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_the_result(isa: str, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(2, 100, 33, 4, 20, dtype=dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ops.cross_attention_maps(q, k, v, 4, impl="cpu"))
    finally:
        torch.set_num_threads(before)
    for out, maps in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(maps, results[0][1])


def test_calls_from_several_threads() -> None:
    q, k, v = make_qkv(2, 200, 33, 4, 20)
    expected = ops.cross_attention_maps(q, k, v, 4)
    results: list = []
    threads = [threading.Thread(target=lambda: results.append(ops.cross_attention_maps(q, k, v, 4))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(maps, expected[1]) and torch.equal(out, expected[0]) for out, maps in results)


def test_autocast_casts_like_matrix_multiplication() -> None:
    q, k, v = make_qkv(2, 37, 19, 4, 8)
    expected = ops.cross_attention_maps(q.bfloat16(), k.bfloat16(), v.bfloat16(), 4)
    for impl in ("auto", "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            out, maps = ops.cross_attention_maps(q, k.bfloat16(), v, 4, impl=impl)
        assert out.dtype == torch.bfloat16
        assert maps.dtype == torch.float32
        if impl == "auto":
            assert torch.equal(maps, expected[1])
        else:  # the reference must not be cast inside: its maps are as good as float32's
            exact = eager(*(x.bfloat16().double() for x in (q, k, v)), 4)[1]
            assert error(maps, exact) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):  # float64 is left alone, as by PyTorch
        assert ops.cross_attention_maps(*(x.double() for x in (q, k, v)), 4)[0].dtype == torch.float64


def test_meta_tensors_have_shapes() -> None:
    out, maps = ops.cross_attention_maps(*make_qkv(device="meta"), 4, categories=[0] * 19, num_categories=3)
    assert (out.shape, maps.shape, maps.dtype) == ((2, 37, 32), (2, 37, 3), torch.float32)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="there Triton kernels are compiled, and tested as implementations"
)
def test_interpreted_triton_through_the_operator() -> None:
    """The kernels' own tests are in tests/kernels; this is how the operator calls them."""
    q, k, v = (x.requires_grad_() for x in make_qkv(2, 20, 18, 2, 8, shared=True))
    kwargs = {"categories": [0, 0, 2, -1] + [3] * 14, "num_categories": 5, "weight": 0.5, "map_grad": True}
    results = []
    for impl in ("triton", "reference"):
        addend = torch.ones(2, 5, 20).transpose(1, 2)
        tensors = (q.transpose(1, 2).contiguous().transpose(1, 2), k, v)
        out, maps = ops.cross_attention_maps(*tensors, 2, **kwargs, addend=addend, impl=impl)
        grads = ops.cross_attention_maps_backward(out.detach(), None, *(x.detach() for x in tensors), 2, impl=impl)
        results.append((out, maps, *grads))
    for actual, expected in zip(*results, strict=True):
        # Sums of 18 tokens, 8 channels and 2 heads, each side rounded in every step.
        assert error(actual.detach(), expected.detach().double()) <= 2 * (18 + 8 + 2) * 2.0**-24


def opcheck_inputs() -> dict[str, list]:
    op = ops.registry()["cross_attention_maps"]

    def flat(*args, **kwargs) -> list:
        return op.flatten(op.bind(*args, **kwargs))

    q, k, v = make_qkv(2, 11, 7, 2, 4)
    shared = [x.requires_grad_() for x in make_qkv(2, 11, 7, 2, 4, shared=True)]
    ids = torch.tensor([0, 0, 2, -1, 3, 3, 3])
    return {
        "plain": flat(q, k, v, 2),
        "gradients": flat(*shared, 2, categories=ids, num_categories=5, addend=torch.zeros(2, 11, 5)),
        "no maps": flat(q, k, v, 2, need_maps=False),
        "heads": flat(q, k, v, 2, average_heads=False),
        "double": flat(q.double(), k.double(), v.double(), 2),
    }


@pytest.mark.parametrize("case", list(opcheck_inputs()))
def test_opcheck(case: str) -> None:
    torch.library.opcheck(torch.ops.vpd_fast.cross_attention_maps.default, (*opcheck_inputs()[case], "auto"))


def test_torch_compile() -> None:
    ids = torch.tensor([0, 0, 2, -1, 3, 3, 3])

    def run(q, k, v):
        out, maps = ops.cross_attention_maps(q * 2, k, v, 2, categories=ids, num_categories=5, map_grad=True)
        return out.sin(), maps + 1

    inputs = gradient_inputs(shared=True, dtype=torch.float32)
    expected = run(*inputs)
    # Code for the operations around it is what the tests of self_attention compile.
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs)
    for actual, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, exact)
    loss = [sum(x.square().sum() for x in result) for result in (found, expected)]
    compiled, eagerly = (torch.autograd.grad(value, inputs) for value in loss)
    for actual, exact in zip(compiled, eagerly, strict=True):
        torch.testing.assert_close(actual, exact)


@pytest.mark.slow
def test_more_than_2_31_probabilities() -> None:
    """Offsets do not overflow: maps of 2.2e9 elements; and as many probabilities behind small maps."""
    queries, tokens = 1_100_000, 2000
    q = torch.randn(1, 64, 8).repeat(1, -(-queries // 64), 1)[:, :queries]
    k, v = torch.randn(1, tokens, 8), torch.randn(1, tokens, 8)
    categories = torch.arange(tokens) % 3
    first = ops.cross_attention_maps(q[:, :64], k, v, 1)
    out, maps = ops.cross_attention_maps(q, k, v, 1, categories=categories, num_categories=3, reduce="sum")
    assert torch.equal(out[:, -64 - queries % 64 :][:, :64], first[0])
    torch.testing.assert_close(maps.sum(-1), torch.ones(1, queries))
    del maps
    out, maps = ops.cross_attention_maps(q, k, v, 1)
    start = queries // 64 * 64 - 64
    assert torch.equal(maps[:, start : start + 64], first[1])
