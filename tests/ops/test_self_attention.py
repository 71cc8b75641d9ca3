"""self_attention against float64, for every implementation and instruction set level."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from vpd_fast.errors import InputError

from .attention_cases import assert_close, error, make_qkv, probabilities, remembered
from .on_device import ops
from .variants import computed_on_gpu

DTYPES = [torch.float32, torch.bfloat16]


@remembered
def eager(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | None = None) -> Tensor:
    return probabilities(q, k, v, heads, scale)[2]


def check_forward(impl: str, q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | None = None) -> Tensor:
    """Holds the result to float64, within the budget of `assert_close`."""
    out = ops.self_attention(q, k, v, heads, scale, impl=impl)
    assert out.dtype == q.dtype
    assert out.shape == q.shape
    exact = eager(q.double(), k.double(), v.double(), heads, scale)
    assert_close(out, eager(q, k, v, heads, scale), exact, q.dtype, computed_on_gpu(impl))
    return out


# Keys are read in pieces of 3, 6 or 12, by level, and in blocks of 120.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 6, 7, 11, 12, 13, 23, 25, 119, 120, 121, 133, 250, 1000])
def test_tokens(impl: str, tokens: int, dtype: torch.dtype) -> None:
    check_forward(impl, *make_qkv(2, 19, tokens, 2, 8, dtype=dtype), 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 100])
def test_queries(impl: str, queries: int, dtype: torch.dtype) -> None:
    check_forward(impl, *make_qkv(3, queries, 29, 2, 8, dtype=dtype), 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [*range(1, 14), 20, 27, 40, 41, 64, 80, 97, 160, 161, 319, 321, 512])
def test_head_dims(impl: str, dim: int, dtype: torch.dtype) -> None:
    check_forward(impl, *make_qkv(2, 21, 37, 3, dim, dtype=dtype), 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1024, 1024, 8, 40), (2, 256, 256, 8, 80), (1, 64, 64, 8, 160)])
def test_sizes_of_the_unet(impl: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = make_qkv(*shape, dtype=dtype)
    heads = 8
    if impl == "triton":  # the interpreter takes a second for each tile
        heads = 2
        q, k, v = (x[..., : 2 * shape[4]] for x in (q[:, :80], k, v))
    check_forward(impl, q, k, v, heads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "tokens", "dim"), [(300, 500, 512), (150, 2000, 80), (33, 3000, 40)])
def test_keys_that_leave_the_cache(impl: str, queries: int, tokens: int, dim: int, dtype: torch.dtype) -> None:
    """Several tiles of queries share what they read then; k and v are one tensor, as in the KL encoder."""
    q, k, _ = make_qkv(2, queries, tokens, 1, dim, dtype=dtype, scale=1.0)
    if impl == "triton":  # the interpreter takes its time for each tile
        q, k = q[1:, :70], k[1:, :600]
    check_forward(impl, q, k, k, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["ascending", "descending", "peaks"])
def test_the_largest_score_may_come_at_any_time(impl: str, order: str, dtype: torch.dtype) -> None:
    """Each key exceeds the one before it by more than what is left as it is, or by less, or only a few do."""
    q, k, v = make_qkv(2, 37, 300, 2, 8, dtype=dtype)
    for step in (0.3, 30.0) if impl == "triton" else (0.01, 0.3, 1.0, 3.0, 30.0):
        rise = step * torch.arange(300, dtype=torch.float64)
        if order == "descending":
            rise = rise.flip(0)
        elif order == "peaks":
            rise = 100 * step * (torch.arange(300) % 97 == 50).double()
        q[..., ::8] = 1.0  # of each head
        k[..., ::8] = (rise * 8**0.5).to(dtype)[:, None]
        check_forward(impl, q, k, v, 2)


@pytest.mark.parametrize("scale", [0.05, 1.0, -0.3, 0.0, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scale(impl: str, scale: float, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(2, 37, 53, 4, 8, dtype=dtype)
    if scale > 1:
        q, k = q * 2.0**-50, k * 2.0**-50
    check_forward(impl, q, k, v, 4, scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_scores_do_not_overflow(impl: str, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(2, 37, 230, 4, 8, dtype=dtype)
    for factor in (2.0**60,) if impl == "triton" else (2.0**10, 2.0**50, 2.0**60):  # exact in every dtype
        out = ops.self_attention(q * factor, k * factor, v, 4, impl=impl)
        exact = eager(q.double(), k.double(), v.double(), 4, factor**2 * 8**-0.5)
        assert out.isfinite().all()
        # So large scores leave one key, but for near ties, which rounding decides.
        assert error(out, exact) < 1e-3 + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_nan_where_it_matters(impl: str, dtype: torch.dtype) -> None:
    heads = 2 if impl == "triton" else 4  # the interpreter takes as long for each of them
    q, k, v = make_qkv(2, 37, 150, heads, 8, dtype=dtype)
    out = ops.self_attention(q, k, v, heads, impl=impl)
    # A new reference splits the sums of the other queries of its tile, too: 150 terms in another order, each rounded to
    # 2^-24, which may flip a rounding to bfloat16.
    limit = 150 * 2.0**-24 if dtype == torch.float32 else torch.finfo(dtype).eps
    specials = (float("nan"), float("inf"), -float("inf"))
    for special in specials[:2] if impl == "triton" else specials:
        changed = q.clone()
        changed[1, 20, 9] = special  # head 1
        new = ops.self_attention(changed, k, v, heads, impl=impl)
        assert new[1, 20, 8:16].isnan().all()
        new[1, 20, 8:16] = out[1, 20, 8:16]
        assert error(new, out.double()) <= limit
        for key in (0, 149) if impl == "triton" else (0, 5, 149):
            changed = v.clone()
            changed[0, key, 3] = special
            new = ops.self_attention(q, k, changed, heads, impl=impl)
            assert not new[0, :, 3].isfinite().any()
            new[0, :, 3] = out[0, :, 3]
            assert error(new, out.double()) <= limit
            changed = k.clone()
            changed[0, key, 3] = special
            new = ops.self_attention(q, changed, v, heads, impl=impl)
            if impl == "sdpa":  # whose kernels leave out what is not finite, or do not
                new[0, :, :8] = out[0, :, :8]
                assert error(new, out.double()) <= limit
                continue
            above = q[0, :, 3].double() * special > 0 if special == special else torch.ones(37, dtype=torch.bool)
            assert new[0, above, :8].isnan().all()  # an infinite score; the opposite one may just be left out
            new[0, :, :8] = out[0, :, :8]
            assert error(new, out.double()) <= limit


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_scores_give_the_mean(impl: str, dtype: torch.dtype) -> None:
    q, k, _ = make_qkv(1, 20, 256, 4, 8, dtype=dtype)
    v = torch.randint(-8, 8, (1, 256, 32)).to(dtype)  # whose sums are exact
    out = ops.self_attention(torch.zeros_like(q), k, v, 4, impl=impl)
    assert torch.equal(out, v.double().mean(1, keepdim=True).to(dtype).expand_as(q))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_context_that_all_images_share(impl: str, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(3, 35, 40, 4, 16, shared=True, dtype=dtype)
    shared = check_forward(impl, q, k, v, 4)
    if impl == "cpu":
        wide = (x.expand(3, -1, -1) for x in (k, v))
        assert torch.equal(ops.self_attention(q, *wide, 4, impl=impl), shared)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(impl: str, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(2, 37, 37, 4, 8 if impl == "cuda" else 7, dtype=dtype)  # which takes whole 16 bytes
    expected = ops.self_attention(q, k, v, 4, impl=impl)
    variants = {
        "one fused projection": torch.cat([q, k, v], dim=-1).chunk(3, dim=-1),
        "at an odd offset": tuple(torch.cat([x[..., :1], x], dim=-1)[..., 1:] for x in (q, k, v)),
        "sequence first": tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)),
        "channels first": tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)),
        "every second": tuple(x.repeat_interleave(2, dim=2)[:, :, ::2] for x in (q, k, v)),
    }
    # Libraries of matrix products choose their loops by the strides; kernels do not. Two orders of the same float32
    # sums over 7 channels and 37 tokens differ by 2 * 44 roundings of 2^-24, 5e-6 of the terms, which may cancel; that
    # may flip a rounding to bfloat16.
    eps = torch.finfo(dtype).eps
    of_a_library = impl in ("sdpa", "reference")
    tolerance = {"rtol": max(1e-5, eps), "atol": max(1e-6, eps)} if of_a_library else {"rtol": 0, "atol": 0}
    for name, tensors in variants.items():
        torch.testing.assert_close(ops.self_attention(*tensors, 4, impl=impl), expected, **tolerance, msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_into_memory_of_the_caller(impl: str, dtype: torch.dtype) -> None:
    dim = 8 if impl == "cuda" else 7  # which takes whole 16 bytes
    q, k, v = make_qkv(2, 37, 37, 4, dim, dtype=dtype)
    expected = ops.self_attention(q, k, v, 4, impl=impl)
    memory = torch.full((2, 40, 64), 7, dtype=dtype)
    columns = torch.full((2, 4 * dim, 40), 7, dtype=dtype)
    for whole, out in ((memory, memory[:, 2:39, 5 : 5 + 4 * dim]), (columns, columns.transpose(1, 2)[:, :37])):
        assert ops.self_attention(q, k, v, 4, out=out, impl=impl) is out
        assert torch.equal(out, expected)
        out.fill_(7)
        assert (whole == 7).all()  # nothing else was touched


def test_the_write_is_known_to_autograd() -> None:
    q, k, v = make_qkv(2, 37, 19, 4, 8)
    out, factor = torch.ones(2, 37, 32), torch.ones(2, 37, 32, requires_grad=True)
    product = (out * factor).sum()
    ops.self_attention(q, k, v, 4, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_empty(impl: str) -> None:
    q, k, v = make_qkv(2, 5, 3, 4, 8, dtype=torch.bfloat16 if impl == "cuda" else torch.float32)
    assert ops.self_attention(q[:0], k[:0], v[:0], 4, impl=impl).shape == (0, 5, 32)
    assert ops.self_attention(q[:, :0], k, v, 4, impl=impl).shape == (2, 0, 32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_runs_do_not_change_the_result(isa: str, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    for shape in ((2, 100, 333, 3, 20), (1, 200, 900, 1, 160)):
        q, k, v = make_qkv(*shape, dtype=dtype)
        results = []
        try:
            for threads in (1, 1, 2, 5):
                torch.set_num_threads(threads)
                results.append(ops.self_attention(q, k, v, shape[3], impl="cpu"))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(result, results[0]) for result in results)


def test_calls_from_several_threads() -> None:
    q, k, v = make_qkv(2, 200, 133, 4, 20)
    expected = ops.self_attention(q, k, v, 4)
    results: list = []
    threads = [threading.Thread(target=lambda: results.append(ops.self_attention(q, k, v, 4))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_for_pytorch(monkeypatch, dtype: torch.dtype) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v = make_qkv(2, 21, 37, 3, 8, dtype=dtype)
    assert ops.explain("self_attention", q, k, v, 3) == {
        "cpu": f"q is {dtype}, not torch.float32 or torch.bfloat16",
        "triton": "q is float64" if dtype == torch.float64 else "q is on cpu, not on a GPU",
        "sdpa": "q is float64" if dtype == torch.float64 else "ok",
        "cuda": "q is on cpu, not on a GPU",
        "reference": "ok",
    }
    check_forward("auto", q, k, v, 3)


def test_autocast_changes_nothing() -> None:
    q, k, v = make_qkv(2, 37, 19, 4, 8)
    for impl in ("cpu", "sdpa", "reference"):
        expected = ops.self_attention(q, k, v, 4, impl=impl)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ops.self_attention(q, k, v, 4, impl=impl), expected)


def test_meta_tensors_have_shapes() -> None:
    q, k, v = make_qkv(device="meta", dtype=torch.bfloat16)
    out = torch.empty_like(q)
    torch.ops.vpd_fast.self_attention.default  # noqa: B018 (registered without native code)
    assert ops.explain("self_attention", q, k, v, 4, out=out)["cpu"] == "q is on meta, not on the CPU"
    assert ops.self_attention(q, k, v, 4).shape == q.shape


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_opcheck(dtype: torch.dtype) -> None:
    op = ops.registry()["self_attention"]
    call = op.bind(*make_qkv(2, 11, 7, 2, 4, dtype=dtype), 2, out=torch.zeros(2, 11, 8, dtype=dtype))
    torch.library.opcheck(torch.ops.vpd_fast.self_attention.default, (*op.flatten(call), "auto"))


def test_torch_compile() -> None:
    def run(q, k, v):
        into = torch.empty_like(q)
        ops.self_attention(q * 2, k, v, 2, out=into)
        return into.sin() + ops.self_attention(q, k, v, 2, scale=0.5)

    q, k, v = make_qkv(2, 11, 7, 2, 4)
    torch.testing.assert_close(torch.compile(run, fullgraph=True)(q, k, v), run(q, k, v))


def test_bad_input_is_named() -> None:
    q, k, v = make_qkv(2, 37, 19, 4, 8)
    good = torch.zeros_like(q)
    bad = [
        (dict(q=None), "q must be a tensor of shape"),
        (dict(q=q[0]), "q must have shape \\(B, N, heads\\*D\\), got \\(37, 32\\)"),
        (dict(heads=0), "heads must be a positive int, got 0"),
        (dict(heads=5), "heads=5 must divide the width of q"),
        (dict(k=k[:, :0], v=v[:, :0]), "k has no elements along L"),
        (dict(v=v[:, :18]), "v must have shape \\(B, L=19, heads\\*D=32\\), got \\(2, 18, 32\\)"),
        (dict(k=k.bfloat16()), "k must be torch.float32 on cpu as q is, got torch.bfloat16 on cpu"),
        (dict(k=k[:1]), "k and v must have the same batch, got 1 and 2"),
        (dict(q=q.int()), "q must be .*float32.* got torch.int32"),
        (dict(scale=float("nan")), "scale must be a finite Python number, got nan"),
        (dict(out=good[:, :36]), "out must have shape \\(B=2, N=37, heads\\*D=32\\), got \\(2, 36, 32\\)"),
        (dict(out=good.bfloat16()), "out must be torch.float32 on cpu as q is, got torch.bfloat16 on cpu"),
        (dict(out=good.to("meta")), "out must be torch.float32 on cpu as q is, got torch.float32 on meta"),
        (dict(out=good[:1].expand(2, -1, -1)), "out must not be expanded: its elements share memory"),
        (dict(q=q.clone().requires_grad_()), "q requires gradients, which self_attention does not compute"),
        (dict(v=v.clone().requires_grad_()), "v requires gradients, which self_attention does not compute"),
        (dict(impl="fast"), "impl must be 'auto' or an implementation of self_attention .* got 'fast'"),
        (dict(impl=None), "impl must be a string, got None"),
        (
            dict(q=q.double(), k=k.double(), v=v.double(), impl="cpu"),
            "impl='cpu' .* cannot run here: q is torch.float64",
        ),
    ]
    for changes, message in bad:
        arguments = {"q": q, "k": k, "v": v, "heads": 4} | changes
        with pytest.raises(InputError, match=message):
            ops.self_attention(**arguments)


def test_gradients_may_be_off() -> None:
    q, k, v = make_qkv(2, 37, 19, 4, 8)
    expected = ops.self_attention(q, k, v, 4)
    with torch.no_grad():
        assert torch.equal(ops.self_attention(q.clone().requires_grad_(), k, v, 4), expected)


@pytest.mark.slow
def test_16384_positions() -> None:
    """Of which a few rows are held to float64; the memory that is needed does not grow with their product."""
    for dtype in DTYPES:
        q, k, v = make_qkv(1, 16384, 16384, 2, 40, dtype=dtype)
        out = ops.self_attention(q, k, v, 2)
        rows = torch.arange(0, 16384, 331)
        exact = eager(q[:, rows].double(), k.double(), v.double(), 2)
        assert_close(out[:, rows], eager(q[:, rows], k, v, 2), exact, dtype)
