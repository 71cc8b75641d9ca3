"""What runs on a GPU and why, without one: tensors claim to be on a GPU, whose capability the tests set."""

from __future__ import annotations

import importlib
import importlib.util
import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from vpd_fast import _native, ops
from vpd_fast.kernels import tables
from vpd_fast.ops import _choices
from vpd_fast.ops.availability import triton_missing
from vpd_fast.ops.packing import FLOAT8, PackedWeight

from ..helpers.fake_gpu import tensors_without_memory

NO_TRITON = importlib.util.find_spec("triton") is None
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
GPU = "cuda:0"
OPERATORS = [  # that have kernels for a GPU
    *("linear", "conv2d", "group_norm_affine", "self_attention", "cross_attention_maps"),
    *("upsample_argmax", "upsample_argmax_windows"),
]

KERNELS = [*OPERATORS[:-1], "cross_attention_maps_backward"]


@pytest.fixture(autouse=True)
def _fake() -> Iterator[None]:
    with tensors_without_memory():
        yield


@pytest.fixture
def gpu(monkeypatch):
    """`gpu((9, 0))`: the capability of all GPUs. Kernels are compiled there, not interpreted."""
    if not NO_TRITON:  # modules decide whether their kernels are interpreted when they are imported
        for name in KERNELS:
            importlib.import_module(f"vpd_fast.kernels.{name}")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "GPU of the test")
    if not NO_TRITON:
        from vpd_fast.kernels import _common

        monkeypatch.setattr(_common, "INTERPRETED", _common.tl.constexpr(False))

    def set_capability(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        _choices.forget()

    yield set_capability
    _choices.forget()


def without(monkeypatch, name: str) -> None:
    """As if the package were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == name else find(n, *a))


def empty(*shape: int, dtype: torch.dtype = BFLOAT16, strides: tuple[int, ...] | None = None) -> Tensor:
    if strides is None:
        return torch.empty(shape, dtype=dtype, device=GPU)
    return torch.empty(0, dtype=dtype, device=GPU).as_strided(shape, strides)


def weight_of(n: int, k: int, dtype: torch.dtype = BFLOAT16) -> PackedWeight:
    scales = empty(1, n, dtype=FLOAT32) if dtype.itemsize == 1 else None
    return PackedWeight(empty(1, n, k, dtype=dtype), scales, scales if dtype == torch.int8 else None, n, k)


def calls(dtype: torch.dtype = BFLOAT16) -> dict[str, tuple[tuple, dict]]:
    """Arguments of the public function of each of OPERATORS."""
    image, vector = empty(2, 8, 8, 32, dtype=dtype), empty(32, dtype=FLOAT32)
    q = empty(2, 64, 80, dtype=dtype)
    return {
        "linear": ((empty(2, 64, 32, dtype=dtype), weight_of(96, 32, dtype)), {"norm": "layer", "activation": "geglu"}),
        "conv2d": ((image, weight_of(48, 288, dtype)), {"kernel": (3, 3), "padding": 1, "silu": True}),
        "group_norm_affine": ((image, vector, vector, 8, 1e-5), {}),
        "self_attention": ((q, q, q, 2), {}),
        "cross_attention_maps": ((q, empty(2, 7, 80, dtype=dtype), empty(2, 7, 80, dtype=dtype), 2), {}),
        "upsample_argmax": ((empty(2, 5, 8, 8, dtype=dtype), (20, 20)), {}),
        "upsample_argmax_windows": (
            (empty(2, 2, 5, 8, 8, dtype=dtype), [0], [0, 8]),
            {"crop_size": (16, 16), "image_size": (16, 24)},
        ),
    }


def first_ok(reasons: dict[str, str]) -> str:
    return next(name for name, reason in reasons.items() if reason == "ok")


@pytest.mark.skipif(NO_TRITON, reason="decides as if it were not installed anyway; see the next test")
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0)])
def test_auto_is_a_kernel_on_a_gpu(gpu, monkeypatch, capability: tuple[int, int], name: str) -> None:
    gpu(capability)
    monkeypatch.setattr(_native, "why_missing", lambda module: f"{module} is not built")
    args, kwargs = calls()[name]
    assert first_ok(ops.explain(name, *args, **kwargs)) == "triton"


@pytest.mark.parametrize("name", OPERATORS)
def test_without_triton(gpu, monkeypatch, name: str) -> None:
    gpu((9, 0))
    without(monkeypatch, "triton")
    monkeypatch.setattr(_native, "why_missing", lambda module: f"{module} is not built")
    args, kwargs = calls()[name]
    reasons = ops.explain(name, *args, **kwargs)
    assert reasons["triton"] == "triton is not installed (it comes with PyTorch's GPU builds)"
    assert first_ok(reasons) == ("sdpa" if name == "self_attention" else "reference")


@pytest.mark.skipif(NO_TRITON, reason="the reason is then another one; see the test before")
@pytest.mark.parametrize("name", OPERATORS)
def test_gpus_that_are_too_old(gpu, monkeypatch, name: str) -> None:
    gpu((7, 5))
    monkeypatch.setattr(_native, "why_missing", lambda module: f"{module} is not built")
    args, kwargs = calls()[name]
    reasons = ops.explain(name, *args, **kwargs)
    assert reasons["triton"] == "GPU of the test is older than compute capability 8.0"
    assert first_ok(reasons) == ("sdpa" if name == "self_attention" else "reference")


@pytest.mark.parametrize("name", ["upsample_argmax", "upsample_argmax_windows"])
def test_cuda_cpp_comes_before_triton(gpu, monkeypatch, name: str) -> None:
    gpu((9, 0))
    monkeypatch.setattr(_native, "why_missing", lambda module: None)
    args, kwargs = calls()[name]
    assert first_ok(ops.explain(name, *args, **kwargs)) == "cuda"


def test_cuda_cpp_leaves_windows_of_many_taps_to_triton(gpu, monkeypatch) -> None:
    gpu((9, 0))
    monkeypatch.setattr(_native, "why_missing", lambda module: None)
    starts = list(range(0, 33, 4))
    args = empty(1, 81, 5, 8, 8), starts, starts
    reasons = ops.explain("upsample_argmax_windows", *args, crop_size=(64, 64), image_size=(96, 96))
    assert "this takes at most 8" in reasons["cuda"]
    assert "this takes at most 2" in reasons["cuda_strips"]
    assert first_ok(reasons) == ("reference" if NO_TRITON else "triton")


def test_self_attention_in_cuda_cpp_is_for_those_who_ask(gpu, monkeypatch) -> None:
    """It takes what the kernel takes, and "auto" does not choose it."""
    monkeypatch.setattr(_native, "why_missing", lambda module: None)

    def why(dtype: torch.dtype = BFLOAT16, dim: int = 40, **options: float) -> str:
        q = empty(2, 64, 2 * dim, dtype=dtype)
        reasons = ops.explain("self_attention", q, q, q, 2, **options)
        assert reasons.auto != "cuda"
        return reasons["cuda"]

    gpu((9, 0))
    assert [why(dtype) for dtype in (BFLOAT16, torch.float16)] == ["ok", "ok"]
    assert [why(dim=dim) for dim in (8, 40, 80, 160)] == ["ok"] * 4
    assert why(FLOAT32) == "q is torch.float32, not of 16 bits"
    for dim in (36, 168):
        assert why(dim=dim) == f"a head has {dim} channels; this takes multiples of 8 up to 160"
    assert why(scale=-1.0) == "the scale is negative (-1.0)"
    for capability in ((8, 0), (10, 0)):
        gpu(capability)
        assert why() == "GPU of the test has no wgmma (compute capability 9.0 has)"


def test_cross_attention_by_wgmma_is_for_those_who_ask(gpu, monkeypatch) -> None:
    """With maps only of as many tokens as are one block of keys."""
    gpu((9, 0))
    monkeypatch.setattr(_native, "why_missing", lambda module: None)
    monkeypatch.setattr("vpd_fast.ops._attention._cuda_scratch", lambda *_: 0)
    q = empty(2, 64, 80)
    for tokens, with_maps in ((7, "ok"), (160, "ok"), (161, "there are 161 tokens; with maps this takes up to 160")):
        k, into = empty(2, tokens, 80), empty(2, 64, tokens, dtype=FLOAT32)
        without = ops.explain("cross_attention_maps", q, k, k, 2, need_maps=False)
        assert without["wgmma"] == "ok"
        for reasons in (
            ops.explain("cross_attention_maps", q, k, k, 2),
            ops.explain("cross_attention_maps_into", q, k, k, into, 2),
        ):
            assert reasons["wgmma"] == with_maps
            assert without.auto == reasons.auto == "cuda"
    assert ops.explain("cross_attention_maps", q, k, k, 2, -1.0)["wgmma"] == "the scale is negative (-1.0)"


def test_who_rounds_results_to_8_bits(gpu, monkeypatch) -> None:
    """Triton, and of CUDA C++ the GEMM and self-attention; whoever does not says so."""
    gpu((9, 0))
    monkeypatch.setattr(_native, "why_missing", lambda module: None)
    monkeypatch.setattr("vpd_fast.ops._attention._cuda_scratch", lambda *_: 0)
    q, k, into, rounding = (
        empty(2, 64, 80),
        empty(2, 7, 80),
        empty(2, 64, 7, dtype=FLOAT32),
        empty(2, 80, dtype=FLOAT32),
    )

    def who_refuses(name: str, *args: object) -> set[str]:
        reasons = ops.explain(name, *args, rounding=rounding)
        return {name for name, reason in reasons.items() if "to be rounded" in reason}

    assert who_refuses("cross_attention_maps_into", q, k, k, into, 2) == {"cuda", "wgmma"}
    assert who_refuses("self_attention", q, q, q, 2) == {"sdpa"}
    copy = {"x_rounding": rounding, "x_out": empty(2, 64, 80, dtype=torch.int8)}
    found = ops.explain("linear", q, weight_of(80, 80), norm="layer", rounding=rounding, **copy)
    assert [found[name] for name in ("triton", "cuda", "cuda_rows")] == ["ok", "ok", "x itself is to be rounded, too"]


@pytest.mark.skipif(NO_TRITON, reason="the reason is then another one")
def test_8_bit_floats_need_a_newer_gpu(gpu) -> None:
    x, weight = empty(1, 64, 32), weight_of(32, 32, FLOAT8)
    for capability in ((8, 0), (8, 6)):
        gpu(capability)
        assert "no 8-bit floating point" in ops.explain("linear", x, weight)["triton"]
    gpu((8, 9))
    assert ops.explain("linear", x, weight)["triton"] == "ok"


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("name", OPERATORS)
def test_references_stay_on_the_device(name: str, dtype: torch.dtype) -> None:
    """Every tensor that a reference makes must be where its arguments are, and nothing may wait for a number."""
    args, kwargs = calls(dtype)[name]
    op = ops.registry()[name]
    arguments = op.bind(*args, **kwargs)
    out = op.choose("reference", arguments).run(arguments)
    for result in out if isinstance(out, tuple) else (out,):
        assert result is None or result.device == torch.device(GPU)


@pytest.mark.parametrize("precision", [torch.int8, FLOAT8])
def test_references_of_8_bits_stay_on_the_device(precision: torch.dtype) -> None:
    x = empty(2, 8, 8, 32)
    calls = {
        "linear": ((x.flatten(1, 2), weight_of(96, 32, precision)), {"activation": "geglu"}),
        "conv2d": ((x, weight_of(48, 288, precision)), {"kernel": (3, 3), "padding": 1}),
    }
    for name, (args, kwargs) in calls.items():
        op = ops.registry()[name]
        arguments = op.bind(*args, **kwargs)
        op.choose("reference", arguments).run(arguments)


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_sdpa_on_a_gpu(gpu, monkeypatch, capability: tuple[int, int]) -> None:
    """Kernels without a matrix of scores take whole 16 bytes, and bfloat16 on newer GPUs; others get parts."""
    gpu(capability)
    seen = []

    def record(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        seen.append(q)
        assert q.dtype == k.dtype == v.dtype == (FLOAT32 if capability < (8, 0) else BFLOAT16)
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] == 48  # of 41
        assert q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= 1 << 28
        return torch.empty_like(q)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    op = ops.registry()["self_attention"]
    for images, contexts, length, parts in ((2, 2, 1000, 1), (1, 1, 40000, 12), (3, 1, 500, 1)):
        seen.clear()
        q, k = empty(images, length, 82), empty(contexts, length, 82)
        arguments = op.bind(q, k, k, 2)
        op.choose("sdpa", arguments).run(arguments)
        assert len(seen) == parts
        assert sum(part.shape[0] * part.shape[2] for part in seen) == images * length


# --- tables of what was fastest ---------------------------------------------------------------------------------------


@pytest.fixture
def table(gpu, monkeypatch, tmp_path: Path):
    """`table(name, microseconds)`: the test's GPU has those times of `calls()[name]`."""

    def write(name: str, microseconds: dict[str, float]) -> None:
        op, (args, kwargs) = ops.registry()[name], calls()[name]
        key, sizes = op.shape(op.bind(*args, **kwargs))
        row = {"operator": op.measured_as or name, "key": key, "sizes": sizes, "us": microseconds}
        path = tmp_path / "mine.json"
        path.write_text(json.dumps({"capability": [9, 0], "choices": [row]}))
        monkeypatch.setenv(tables.VARIABLE, str(path))
        gpu((9, 0))

    return write


@pytest.mark.skipif(NO_TRITON, reason="only the reference is left")
@pytest.mark.parametrize(
    ("name", "times", "expected"),
    [
        ("linear", {"triton": 3, "cuda": 2, "library": 1}, ["library", "cuda", "triton", "cuda_rows"]),
        ("linear", {"triton": 2, "cuda": 1}, ["cuda", "triton", "library", "cuda_rows"]),
        ("linear", {"cuda_rows": 1, "triton": 2}, ["cuda_rows", "triton", "cuda", "library"]),
        ("conv2d", {"library": 1, "triton": 2}, ["library", "triton", "cuda", "cuda_rows"]),
        ("self_attention", {"sdpa": 1, "triton": 2}, ["sdpa", "triton", "cuda"]),
        ("upsample_argmax", {"triton": 1, "cuda": 2}, ["triton", "cuda", "cuda_strips"]),
        ("upsample_argmax", {"cuda_strips": 1, "cuda": 2}, ["cuda_strips", "cuda", "triton"]),
        ("upsample_argmax_windows", {"triton": 1, "cuda": 2}, ["triton", "cuda"]),  # they overlap
    ],
)
def test_a_table_decides(table, monkeypatch, name: str, times: dict, expected: list[str]) -> None:
    monkeypatch.setattr(_native, "why_missing", lambda module: None)
    table(name, times)
    op, (args, kwargs) = ops.registry()[name], calls()[name]
    reasons = ops.explain(name, *args, **kwargs)
    assert [i for i in reasons if reasons[i] == "ok" and i != "reference"] == expected
    assert reasons.auto == expected[0] == op.choose("auto", op.bind(*args, **kwargs)).name
    assert "mine.json (VPD_FAST_TUNING): " in reasons.by
    assert reasons.by in repr(reasons)


@pytest.mark.skipif(NO_TRITON, reason="only the reference is left")
def test_the_second_fastest_stands_in_for_what_cannot_run(table, monkeypatch) -> None:
    monkeypatch.setattr(_native, "why_missing", lambda module: f"{module} is not built")
    table("linear", {"cuda": 1, "library": 2, "triton": 3})
    args, kwargs = calls()["linear"]
    reasons = ops.explain("linear", *args, **kwargs)
    assert list(reasons) == ["cuda", "library", "triton", "cpu", "cuda_rows", "reference"]
    assert (reasons["cuda"], reasons.auto) == ("_C_cuda is not built", "library")


def test_a_damaged_table_leaves_the_order_of_the_list(table, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_native, "why_missing", lambda module: None)
    table("upsample_argmax", {"triton": 1, "cuda": 2})
    (tmp_path / "mine.json").write_text("{}]")
    args, kwargs = calls()["upsample_argmax"]
    with pytest.warns(UserWarning, match="mine.json is no table of tuned configurations"):
        reasons = ops.explain("upsample_argmax", *args, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing more
        assert list(ops.explain("linear", *calls()["linear"][0]))[:2] == ["cpu", "triton"]
    assert reasons.auto == "cuda"
    assert reasons.by.endswith("mine.json is damaged)")


def test_a_tensor_without_a_gpu_has_no_table() -> None:
    """As when somebody traces for a GPU that is not there."""
    _choices.forget()
    reasons = ops.explain("upsample_argmax", *calls()["upsample_argmax"][0])
    assert reasons.by == "the order of the list (there is no GPU cuda:0)" or torch.cuda.is_available()


@pytest.mark.skipif(NO_TRITON, reason="is refused for that reason already")
def test_what_libraries_cannot_compute(gpu, monkeypatch) -> None:
    gpu((9, 0))

    def why(name: str, *args: object, **kwargs: object) -> str:
        return ops.explain(name, *args, **kwargs)["library"]

    x, image = empty(2, 64, 32), empty(2, 8, 8, 32)
    assert why("linear", x, weight_of(48, 32)) == "ok"
    assert why("linear", x, weight_of(48, 64), x2=x) == "there are two sources, and nothing to be done that joins them"
    assert why("linear", x, weight_of(48, 64), x2=x, scale=empty(64, dtype=FLOAT32)) == "ok"
    assert why("linear", empty(2, 64, 64)[..., :32], weight_of(48, 32)) == "rows of x are not evenly spaced"
    assert why("linear", empty(2, 64, 64)[..., :32], weight_of(48, 32), norm="layer") == "ok"
    assert "48x36; this takes multiples of 8" in why("linear", empty(2, 64, 36), weight_of(48, 36, torch.int8))
    assert "there are 16 rows; this takes at least 17" in why("linear", empty(1, 16, 32), weight_of(48, 32, torch.int8))
    assert why("linear", empty(1, 17, 32), weight_of(48, 32, torch.int8)) == "ok"
    float32 = empty(2, 64, 32, dtype=FLOAT32), weight_of(48, 32, FLOAT32)
    assert why("linear", *float32) == "ok"
    float16 = empty(2, 64, 32, dtype=torch.float16), weight_of(48, 32, torch.float16)
    assert why("linear", *float16) == "ok"
    settings = SimpleNamespace(allow_tf32=True, allow_fp16_accumulation=True)
    monkeypatch.setattr(torch.backends.cuda, "matmul", settings)
    assert "may round factors to TF32" in why("linear", *float32)
    assert "may sum in float16" in why("linear", *float16)
    assert why("linear", x, weight_of(48, 32)) == "ok"
    how = {"kernel": (3, 3), "padding": 1}
    assert why("conv2d", image, weight_of(48, 288), **how) == "ok"
    assert "a convolution in torch.int8" in why("conv2d", image, weight_of(48, 288, torch.int8), **how)
    rounded = why("conv2d", image, weight_of(48, 288), out_dtype=FLOAT32, **how)
    assert rounded == "cuDNN's sums are rounded to torch.bfloat16, and out is torch.float32"
    half = empty(2, 8, 8, 32, dtype=torch.float16), weight_of(48, 288, torch.float16)
    assert why("conv2d", *half, **how) == "ok"
    assert "torch.float16, and out is torch.bfloat16" in why("conv2d", *half, out_dtype=BFLOAT16, **how)
    how = {"kernel": (3, 3), "padding": (0, 0, 1, 1), "stride": 2}
    assert why("conv2d", image, weight_of(48, 288), **how) == "padding is not symmetric"
    assert why("conv2d", image, weight_of(48, 288), silu=True, **how) == "ok"  # prepared with its padding
    assert why("conv2d", image, weight_of(48, 32), kernel=(1, 1), padding=1) == "padding is not prepared"
    enlarging = PackedWeight(empty(4, 48, 128), None, None, 48, 128)
    assert why("conv2d", image, enlarging, kernel=(2, 2), upsample=True) == "the image is to be enlarged"


# --- offsets beyond 32 bits -------------------------------------------------------------------------------------------

LINEAR = {  # what is refused, and how it may be made: rows, their distance, columns, rows of the weight
    "an image of x spans": (1 << 20, 1 << 12, 64, 8),
    "an image of out spans": (1 << 24, 0, 64, 128),
    "positions; this takes fewer than 2\\*\\*30": (1 << 30, 0, 1, 1),
    "the weight has 2147483648 numbers": (4, 16384, 16384, 1 << 17),
    "a row has 16385 columns": (4, 16385, 16385, 8),
}


@pytest.mark.skipif(NO_TRITON, reason="is refused for that reason already")
class TestOffsets:
    @pytest.fixture(autouse=True)
    def _newest(self, gpu, monkeypatch) -> None:
        monkeypatch.setattr(_native, "why_missing", lambda module: f"{module} is not built")
        gpu((9, 0))

    @pytest.mark.parametrize("reason", LINEAR)
    def test_linear(self, reason: str) -> None:
        rows, apart, k, n = LINEAR[reason]
        x = empty(1, rows, k, strides=(0, apart, 1))
        with pytest.raises(AssertionError, match=reason):
            self.require("linear", x, weight_of(n, k))
        self.require("linear", x[:, : rows // 4], weight_of(n, k) if n < 1 << 17 else weight_of(n - 1, k), widest=k)

    def require(self, name: str, *args: object, widest: int = 0, **kwargs: object) -> None:
        reason = ops.explain(name, *args, **kwargs)["triton"]
        assert reason == "ok" or widest > 16384, reason

    @pytest.mark.parametrize(
        ("shape", "strides", "padding", "stride", "reason"),
        [
            ((1, 4096, 4096, 3), None, 1, 1, "an image of out spans"),
            ((1, 4096, 4096, 128), None, 1, 2, "an image of x spans"),
            ((1, 2, 2, 64), None, (1 << 14, 1 << 13, 1 << 13, 1 << 13), 1 << 13, "a prepared image"),
            ((1 << 14, 2, 2, 1), None, (255, 255, 255, 255), 256, "padded x has .* positions"),
            ((1, 8, 8, 8), (0, 1 << 29, 8, 1), 1, 1, "an image of x spans"),
        ],
    )
    def test_conv2d(self, shape, strides, padding, stride: int, reason: str) -> None:
        x, n = empty(*shape, strides=strides), 128
        options = {"kernel": (3, 3), "padding": padding, "stride": stride}
        with pytest.raises(AssertionError, match=reason):
            self.require("conv2d", x, weight_of(n, 9 * shape[3]), **options)

    def test_conv2d_that_enlarges(self) -> None:
        """Whose zeros around the image count, too: 46341 by 46341 positions, unlike 46340 by 46340, are 2**31."""
        op = ops.registry()["conv2d"]
        weight = PackedWeight(empty(4, 8, 4), None, None, 8, 4)
        call = op.bind(empty(1, 4, 4, 1), weight, kernel=(2, 2), upsample=True)
        triton = next(i for i in op.implementations if i.name == "triton")
        for side, reason in ((46338, "padded x has 2147395600 positions"), (46339, "a prepared image has more")):
            assert reason in triton.refuse(replace(call, x=empty(1, side, side, 1)))
        assert triton.refuse(call) is None

    def test_conv2d_into_a_wide_tensor(self) -> None:
        """A slice of channels of something larger, which lies further apart than the result is large."""
        x, weight = empty(1, 1024, 1024, 4), weight_of(8, 4)
        wide = empty(1, 1024, 1024, 4096)
        for name in ("out", "residual"):
            other = {name: wide[..., :8]}
            with pytest.raises(AssertionError, match=f"an image of {name} spans"):
                self.require("conv2d", x, weight, kernel=(1, 1), **other)
            self.require("conv2d", x, weight, kernel=(1, 1), **{name: wide[..., :1024].clone()[..., :8]})

    @pytest.mark.parametrize(
        ("q", "k", "reason"),
        [
            ((1, 64, 1 << 25, 80), (1, 7, 80, 80), "rows of q are more than 2\\*\\*25"),
            ((1, 64, 80, 80), (1, 7, 1 << 29, 80), "k or v of one image spans"),
            ((1, 64, 0, 80), (1, (1 << 20) + 1, 0, 80), "there are 1048577 tokens"),
            ((1, 1 << 30, 0, 80), (1, 7, 80, 80), "heads and rows of one image are more than 2\\*\\*31"),
            ((1, 64, 600, 600), (1, 4, 1 << 24, 600), "q, k or v are more than 2\\*\\*24 elements apart"),
            ((1, 64, 600, 600), (1, (1 << 23) + 1, 0, 600), "there are 8388609 keys"),
        ],
    )
    def test_attention(self, q: tuple, k: tuple, reason: str) -> None:
        """q, k: batch, rows, their distance and channels."""
        heads = 2
        q, k = (empty(b, n, c, strides=(0, apart, 1)) for b, n, apart, c in (q, k))
        with pytest.raises(AssertionError, match=reason):
            self.require("self_attention", q, k, k, heads, out=empty(1, q.shape[1], q.shape[2]))
        if q.shape[2] == 80:
            with pytest.raises(AssertionError, match=reason):
                self.require("cross_attention_maps", q, k, k, heads)

    def test_copies_count_as_they_will_be(self) -> None:
        """Of a tensor whose channels are strided, rows are far apart only once they are copied."""
        q, k = empty(1, 64, 80), empty(1, 1 << 19, 8192, strides=(0, 1, 1 << 19))
        wide = empty(1, 64, 8192)
        assert k.stride(1) * k.shape[1] < 2**31
        with pytest.raises(AssertionError, match="k or v of one image spans"):
            self.require("cross_attention_maps", wide, k, k, 64)
        self.require("cross_attention_maps", q, k[..., :80], k[..., :80], 2)

    def test_texts_of_a_backward(self) -> None:
        q, k = empty(65536, 4, 8, strides=(0, 8, 1)), empty(65536, 3, 8, strides=(0, 8, 1))
        op = ops.registry()["cross_attention_maps_backward"]
        triton = next(i for i in op.implementations if i.name == "triton")

        def refuses(images: int) -> str | None:
            return triton.refuse(op.bind(q[:images], None, q[:images], k[:images], k[:images], 2))

        assert "there are 65536 texts" in refuses(65536)
        assert refuses(65535) is None

    def test_groups(self) -> None:
        x, vector = empty(1, 2, 2, 8193), empty(8193, dtype=FLOAT32)
        with pytest.raises(AssertionError, match="a group has 8193 channels; this takes at most 8192"):
            self.require("group_norm_affine", x, vector, vector, 1, 1e-5)
        self.require("group_norm_affine", x[..., 1:], vector[1:], vector[1:], 1, 1e-5)


def test_triton_is_for_gpus(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_missing(torch.empty(1, device="meta")) == "x is on meta, not on a GPU"
