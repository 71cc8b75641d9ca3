"""upsample_argmax against float64 interpolate + argmax, for every implementation and instruction set level."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.nn.functional import interpolate

from vpd_fast.errors import InputError
from vpd_fast.ops._dispatch import registry

from ..helpers.sparse import untouched
from .on_device import ops
from .variants import BY_KERNELS, variants

KERNELS = variants(registry()["upsample_argmax"].by_name, BY_KERNELS)  # for GPUs
UNIT_ROUNDOFF = 2.0**-24


def make_logits(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def make_smooth_logits(batch: int, channels: int, h: int, w: int) -> torch.Tensor:
    """Like those of a network: regions in which few channels compete, with noise on top."""
    coarse = make_logits(batch, channels, h // 6 + 2, w // 6 + 2, seed=1)
    return interpolate(coarse, (h, w), mode="bicubic") + make_logits(batch, channels, h, w, seed=2, scale=0.2)


def assert_argmax_of(labels: torch.Tensor, values: torch.Tensor, logits: torch.Tensor, taps: int = 4) -> None:
    """labels must be the argmax over channels of `values` (float64), but for rounding in float32.

    Each of the `taps` products and sums (over both axes) and the rounding of the two weights has a relative error of at
    most one unit roundoff of the largest logit; two channels are compared, so their gap may be twice the sum.
    """
    finite = logits[logits.isfinite()]
    bound = 2 * (2 * taps + 2) * UNIT_ROUNDOFF * finite.abs().max().item()
    assert labels.dtype == torch.int64
    assert labels.shape == (values.shape[0], *values.shape[2:])
    gap = values.amax(1) - values.gather(1, labels[:, None])[:, 0]
    assert gap.max().item() <= bound


@pytest.mark.parametrize("channels", [1, 2, 3, 15, 16, 17, 150, 847])
def test_channels(impl: str, channels: int) -> None:
    kinds = (make_smooth_logits(1, channels, 9, 11), make_logits(1, channels, 9, 11))
    for logits in kinds[:1] if impl == "triton" else kinds:  # whose time in the interpreter is by channels
        labels = ops.upsample_argmax(logits, (45, 61), impl=impl)
        assert_argmax_of(labels, interpolate(logits.double(), (45, 61), mode="bilinear"), logits)


SIZES = [
    ((1, 1), (1, 1)),
    ((1, 1), (5, 37)),
    ((1, 9), (3, 40)),
    ((5, 7), (5, 7)),
    ((5, 7), (10, 14)),
    ((8, 8), (64, 64)),
    ((6, 5), (47, 15)),
    ((6, 5), (48, 16)),
    ((6, 5), (49, 17)),
    ((4, 33), (31, 257)),
    ((7, 6), (13, 199)),
    ((40, 50), (20, 25)),
    ((40, 50), (13, 7)),
    ((33, 65), (1, 1)),
    ((30, 8), (7, 100)),
]


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("low", "high"), SIZES)
def test_sizes(impl: str, low: tuple[int, int], high: tuple[int, int], align_corners: bool) -> None:
    logits = make_smooth_logits(2, 21, *low)
    labels = ops.upsample_argmax(logits, high, align_corners=align_corners, impl=impl)
    assert_argmax_of(labels, interpolate(logits.double(), high, mode="bilinear", align_corners=align_corners), logits)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_batch(impl: str, batch: int) -> None:
    logits = make_logits(batch, 5, 6, 7)
    labels = ops.upsample_argmax(logits, (20, 30), impl=impl)
    assert labels.shape == (batch, 20, 30)
    if batch:
        assert_argmax_of(labels, interpolate(logits.double(), (20, 30), mode="bilinear"), logits)


def strided_variants() -> dict[str, torch.Tensor]:
    x = make_logits(2, 19, 10, 12)
    wide = torch.full((2, 38, 20, 36), float("nan"))
    wide[:, ::2, ::2, ::3] = x
    return {
        "channels_last": x.to(memory_format=torch.channels_last),
        "every second element": wide[:, ::2, ::2, ::3],
        "transposed": x.mT.contiguous().mT,
        "one image for all": x[:1].expand(3, -1, -1, -1),
        "one channel for all": x[:, :1].expand(-1, 19, -1, -1),
        "offset": torch.cat([x, x])[1:3],
    }


@pytest.mark.parametrize("layout", list(strided_variants()))
def test_strides_do_not_matter(impl: str, layout: str) -> None:
    logits = strided_variants()[layout]
    expected = ops.upsample_argmax(logits.contiguous(), (37, 70), impl=impl)
    assert torch.equal(ops.upsample_argmax(logits, (37, 70), impl=impl), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_resized_in_float32(impl: str, dtype: torch.dtype) -> None:
    channels = 40 if impl == "triton" else 150  # the interpreter's time is by channels
    logits = make_smooth_logits(1, channels, 16, 16).to(dtype)
    labels = ops.upsample_argmax(logits, (128, 100), impl=impl)
    assert_argmax_of(labels, interpolate(logits.double(), (128, 100), mode="bilinear"), logits)


def test_equal_channels_give_the_lowest(impl: str) -> None:
    logits = make_logits(1, 40, 6, 6).round()  # small integers at powers of two: exact in float32
    logits = torch.cat([logits, logits, logits], 1)
    labels = ops.upsample_argmax(logits, (48, 48), impl=impl)
    assert torch.equal(labels, interpolate(logits.double(), (48, 48), mode="bilinear").argmax(1))
    assert labels.max() < 40


def test_all_channels_equal_give_zero(impl: str) -> None:
    for value in (0.0, -0.0, 1e-40, 7.0, float("-inf"), float("inf"), float("nan")):
        logits = torch.full((1, 33, 4, 5), value)
        assert not ops.upsample_argmax(logits, (16, 40), impl=impl).any(), value


def test_masked_classes_never_win(impl: str) -> None:
    logits = make_smooth_logits(1, 20, 8, 9)
    masked = logits.clone()
    masked[:, ::2] = float("-inf")
    labels = ops.upsample_argmax(masked, (64, 70), impl=impl)
    values = interpolate(logits.double(), (64, 70), mode="bilinear")
    values[:, ::2] = float("-inf")
    assert_argmax_of(labels, values, logits)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
def test_special_values_reach_exactly_the_pixels_that_read_them(impl: str, special: float) -> None:
    logits = make_smooth_logits(1, 35, 8, 9)
    logits[0, 20, 3, 4] = special
    logits[0, 30, 3, 4] = special
    size = (61, 70)
    touched = torch.zeros(1, 1, 8, 9, dtype=torch.float64)
    touched[0, 0, 3, 4] = 1
    touched = interpolate(touched, size, mode="bilinear")[:, 0] > 0
    labels = ops.upsample_argmax(logits, size, impl=impl)
    finite = logits.where(logits.isfinite(), 0.0)
    values = interpolate(finite.double(), size, mode="bilinear")
    for channel in (20, 30):
        values[:, channel] = torch.where(touched, special, values[:, channel])
    if special != float("-inf"):
        assert (labels[touched] == 20).all()
        values[:, :, touched[0]] = 0.0  # decided above; what is left must be ordinary
    assert_argmax_of(labels, values, finite)


def test_infinities_of_both_signs_make_nan_which_wins(impl: str) -> None:
    logits = torch.zeros(1, 3, 1, 2)
    logits[0, 1] = torch.tensor([[float("inf"), float("inf")]])
    logits[0, 2] = torch.tensor([[float("-inf"), float("inf")]])
    labels = ops.upsample_argmax(logits, (1, 8), impl=impl)
    assert labels.tolist() == [[[1, 1, 2, 2, 2, 2, 1, 1]]]


def test_extreme_magnitudes(impl: str) -> None:
    """Channels that differ by many orders of magnitude, where a bound computed too tightly would discard the winner."""
    logits = make_logits(1, 64, 8, 8) * torch.logspace(-38, 30, 64)[None, :, None, None]
    labels = ops.upsample_argmax(logits, (64, 64), impl=impl)
    values = interpolate(logits.double(), (64, 64), mode="bilinear")
    gap = values.amax(1) - values.gather(1, labels[:, None])[:, 0]
    assert (gap <= 24 * UNIT_ROUNDOFF * logits.abs().amax().item()).all()
    tiny = make_logits(1, 64, 8, 8) * 1e-36
    assert_argmax_of(
        ops.upsample_argmax(tiny, (64, 64), impl=impl), interpolate(tiny.double(), (64, 64), mode="bilinear"), tiny
    )


@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-6, 1e-4])
def test_discarding_channels_changes_nothing(impl: str, noise: float) -> None:
    """Channels that nearly tie are decided by the rounding of the full computation, not by the bounds."""
    base = make_smooth_logits(1, 1, 10, 10)
    logits = base + noise * make_logits(1, 50, 10, 10)
    labels = ops.upsample_argmax(logits, (80, 80), impl=impl)
    assert_argmax_of(labels, interpolate(logits.double(), (80, 80), mode="bilinear"), logits)


def test_threads_and_repetition_do_not_change_a_bit(isa: str) -> None:
    logits = make_smooth_logits(3, 30, 12, 13)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            results.append(ops.upsample_argmax(logits, (100, 90), impl="cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("width", [1, 15, 16, 17, 100])
def test_writes_all_labels_and_nothing_else(monkeypatch, isa: str, width: int) -> None:
    buffers = []

    def new_empty(self: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        count = torch.Size(shape).numel()
        buffers.append(torch.full((count + 64,), -7, dtype=dtype))
        return buffers[-1][32:-32].view(shape)

    logits = make_logits(2, 6, 5, 5)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", new_empty)
        labels = ops.upsample_argmax(logits, (33, width), impl="cpu")
    (buffer,) = buffers
    assert (buffer[:32] == -7).all()
    assert (buffer[-32:] == -7).all()
    assert (labels >= 0).all()


def test_offsets_beyond_32_bits() -> None:
    """An image dimension that strides over more than 2**31 elements, without that much memory."""
    storage = untouched((1 << 31) + 1000)
    logits = storage.as_strided((2, 3, 4, 4), (1 << 31, 16, 4, 1))
    logits.copy_(make_logits(2, 3, 4, 4))
    assert torch.equal(ops.upsample_argmax(logits, (9, 9)), ops.upsample_argmax(logits.contiguous(), (9, 9)))


def test_reference_in_parts_is_the_whole(monkeypatch) -> None:
    logits = make_logits(1, 5, 6, 7)
    whole = ops.upsample_argmax(logits, (33, 20), impl="reference")
    monkeypatch.setattr(sys.modules["vpd_fast.ops.upsample_argmax"], "MAX_REFERENCE_ELEMENTS", 5 * 20 * 4)
    assert torch.equal(ops.upsample_argmax(logits, (33, 20), impl="reference"), whole)


@pytest.mark.parametrize("size", [(16, 24), [16, 24], torch.Size([16, 24])])
def test_forms_of_size(size) -> None:
    assert ops.upsample_argmax(make_logits(1, 3, 4, 4), size).shape == (1, 16, 24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3, 4, 4)}, r"logits must have shape \(B, C, h, w\), got \(3, 4, 4\)"),
        ({"logits": torch.zeros(1, 0, 4, 4)}, "logits has no elements along C"),
        ({"logits": torch.zeros(1, 3, 0, 4)}, "logits has no elements along h"),
        (
            {"logits": torch.zeros(1, 3, 4, 4, dtype=torch.float64)},
            "logits must be torch.float32 or .* got torch.float64",
        ),
        ({"logits": torch.zeros(1, 3, 4, 4, dtype=torch.long)}, "got torch.int64"),
        ({"logits": [[1.0]]}, "logits must be a tensor .* got list"),
        ({"size": (0, 4)}, r"size must be two positive integers .* got \(0, 4\)"),
        ({"size": (4, 2**31)}, "size must be at most 16777216 pixels"),
        ({"size": (4, -1)}, r"got \(4, -1\)"),
        ({"size": (4.0, 4)}, "size must be two positive integers"),
        ({"size": (4,)}, r"size must be \(height, width\)"),
        ({"size": 4}, r"size must be \(height, width\), got 4"),
        ({"impl": "gpu"}, "impl must be 'auto' or an implementation .* got 'gpu'"),
        ({"impl": "cuda"}, "impl='cuda' of upsample_argmax cannot run here: logits are on cpu"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    arguments = {"logits": torch.zeros(1, 3, 4, 4), "size": (8, 8), **change}
    with pytest.raises(InputError, match=message):
        ops.upsample_argmax(**arguments)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout: str) -> None:
    logits = make_logits(2, 5, 6, 7)
    if layout == "channels_last":
        logits = logits.to(memory_format=torch.channels_last)
    reasons = ops.explain("upsample_argmax", logits, (12, 30))
    for name in ("auto", *(name for name, reason in reasons.items() if reason == "ok")):
        torch.library.opcheck(torch.ops.vpd_fast.upsample_argmax.default, (logits, (12, 30), False, name))


def test_torch_compile_through_the_public_function() -> None:
    def double_then_label(x: torch.Tensor) -> torch.Tensor:
        return ops.upsample_argmax(x * 2, (x.shape[2] * 8, 40)) + 1

    compiled = torch.compile(double_then_label, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((4, 5), (6, 9)):
        logits = make_logits(1, 7, *size)
        assert torch.equal(compiled(logits), double_then_label(logits))


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("low", "high"), SIZES)
def test_cuda(low: tuple[int, int], high: tuple[int, int], dtype: torch.dtype, name: str) -> None:
    for channels in (1, 21, 150):
        logits = make_smooth_logits(2, channels, *low).to("cuda", dtype)
        for layout in (torch.contiguous_format, torch.channels_last):
            labels = ops.upsample_argmax(logits.to(memory_format=layout), high, impl=name)
            assert_argmax_of(labels, interpolate(logits.double(), high, mode="bilinear"), logits)


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
def test_cuda_special_values_and_ties(name: str) -> None:
    logits = make_smooth_logits(1, 35, 8, 9)
    logits[0, 20, 3, 4] = float("nan")
    logits[0, 25, 6, 4] = float("inf")
    logits[0, 5] = float("-inf")
    logits = torch.cat([logits, logits], 1)
    expected = ops.upsample_argmax(logits, (64, 72), impl="cpu")
    assert torch.equal(ops.upsample_argmax(logits.cuda(), (64, 72), impl=name).cpu(), expected)


@pytest.mark.gpu
def test_cuda_opcheck_and_device_of_result() -> None:
    logits = make_logits(2, 5, 6, 7).cuda()
    assert ops.upsample_argmax(logits, (12, 30)).device == logits.device
    for name in KERNELS:
        torch.library.opcheck(torch.ops.vpd_fast.upsample_argmax.default, (logits, (12, 30), False, name))
