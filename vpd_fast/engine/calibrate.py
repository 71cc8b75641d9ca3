"""Calibration: the inputs that layers see on given images, the smoothing of their channels, and each layer's error.

An 8-bit row shares one scale among its channels, so channels of much smaller range are rounded coarsely. Dividing the
input's channels by their range^alpha and multiplying the weight's by it changes nothing but the rounding (Xiao et al.,
SmoothQuant, ICML 2023, equation 4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vpd_fast.config import SIZE_MULTIPLE
from vpd_fast.engine.blocks import to_nchw, to_nhwc
from vpd_fast.engine.layers import GemmLayer, Layer, Linear, intercepted
from vpd_fast.engine.model import FastVPD
from vpd_fast.engine.policy import Policy
from vpd_fast.engine.specs import Spec
from vpd_fast.errors import InputError
from vpd_fast.models import checks
from vpd_fast.models.vpd import VPD
from vpd_fast.ops.packing import MAX_8_BITS, PackedWeight
from vpd_fast.ops.rounding import LEAST, LEVELS, round_columns, rounded_rows

ALPHAS = (0.0, 0.25, 0.5, 0.75)  # candidates; 0 leaves the channels as they are
MARGIN = 1.25  # of the range that a static scale has room for, over that of the calibration images
SAMPLE_SIDE = 16  # side of the square of positions kept of each layer's input
Batch = tuple[Tensor, ...]  # arguments of one call of a model


def check_batches(calibration: Sequence[Tensor | Batch] | Tensor, model: VPD) -> list[Batch]:
    """Calibration images as arguments of calls, a referring model's with sentences. Raises InputError for bad ones."""
    if not isinstance(calibration, (Tensor, Sequence)):
        raise InputError(f"calibration must be images or a list of them, got {type(calibration).__name__}")
    items = [calibration] if isinstance(calibration, Tensor) else list(calibration)
    if not items:
        raise InputError("calibration has no images")
    depth, referring = (model.config.task == task for task in ("depth", "referring"))
    least, most = (0.0, 1.0) if depth else (-1.0, 1.0)
    batches = []
    for i, item in enumerate(items):
        name, sentences = f"calibration[{i}]", None
        images: Any = item
        if referring and isinstance(item, tuple) and len(item) == 2:
            images, sentences = item
        if isinstance(images, Tensor) and images.dim() == 3 and not images.is_nested:
            images = images[None]
        try:
            checks.images(images, model.device, model.dtype, SIZE_MULTIPLE // 2 if depth else SIZE_MULTIPLE)
            if sentences is not None:
                checks.same_batch(images, sentences, "tokens")
                model.context(sentences)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        if not len(images):
            raise InputError(f"{name} has no images")
        if not torch.isfinite(images).all():
            raise InputError(f"{name} has values that are not finite")
        low, high = images.min().item(), images.max().item()
        if low < least - 1e-3 or high > most + 1e-3:
            raise InputError(f"{name} has values in [{low:.3g}, {high:.3g}]; images must be in [{least:g}, {most:g}]")
        if low == high:
            raise InputError(f"{name} is constant ({low:.3g}): it says nothing about ranges")
        if referring and sentences is None:  # the text encoder's last layer norm leaves numbers of about this size
            shape = len(images), model.config.tokens, model.config.backbone.context_dim
            sentences = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        batches.append((images,) if sentences is None else (images, sentences))
    return batches


@dataclass
class _LayerInput:
    """The input of a layer: the range of each channel, and a square of positions of the first batch.

    widths: channels of each source.
    """

    widths: tuple[int, ...]
    low: Tensor
    high: Tensor
    sample: Tensor  # (1,h,w,c) float32, or (1,n,c) of a linear layer

    @property
    def largest(self) -> Tensor:
        """The largest magnitude of each channel."""
        return torch.maximum(-self.low, self.high)


class _Recorder:
    """Notes the input of a layer as the matrix product gets it, whenever the layer is called."""

    def __init__(self, layer: GemmLayer, inputs: dict[str, _LayerInput], name: str) -> None:
        self._layer, self._inputs, self._name = layer, inputs, name

    def __call__(
        self,
        call: Callable[..., Tensor],
        x: Tensor,
        x2: Tensor | None = None,
        affine: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        rows = (x if x2 is None else torch.cat([x, x2.to(x.dtype)], dim=-1)).float()
        if affine is not None:
            scale, shift = (t.view(t.shape[0], *[1] * (rows.dim() - 2), -1) for t in affine.unbind(1))
            rows = torch.addcmul(shift, rows, scale)
        if getattr(self._layer, "silu", False):
            rows = F.silu(rows)
        if isinstance(self._layer, Linear) and self._layer.norm:
            rows = F.layer_norm(rows, rows.shape[-1:], eps=self._layer.eps)
        low, high = rows.flatten(0, -2).aminmax(dim=0)
        inputs = self._inputs.get(self._name)
        if inputs is None:
            widths = tuple(source.shape[-1] for source in (x, x2) if source is not None)
            self._inputs[self._name] = _LayerInput(widths, low, high, _center(rows))
        else:
            inputs.low, inputs.high = torch.minimum(inputs.low, low), torch.maximum(inputs.high, high)
        return call(x, x2=x2, affine=affine, **options)


def _center(rows: Tensor) -> Tensor:
    if rows.dim() == 3:
        step = max(1, rows.shape[1] // SAMPLE_SIDE**2)
        return rows[:1, ::step].clone()
    top, left = (max(0, (size - SAMPLE_SIDE) // 2) for size in rows.shape[1:3])
    return rows[:1, top : top + SAMPLE_SIDE, left : left + SAMPLE_SIDE].clone()


class Calibration:
    """The inputs of all layers on the calibration images."""

    def __init__(self, inputs: dict[str, _LayerInput], policy: Policy, precision: str) -> None:
        self._inputs, self._policy, self._precision = inputs, policy, precision

    @classmethod
    @torch.no_grad()
    def run(cls, model: FastVPD, batches: Sequence[Batch], policy: Policy, precision: str) -> Calibration:
        """Run a fast model of high precision on the images, for one of `precision`."""
        inputs: dict[str, _LayerInput] = {}
        layers = model.layers
        for name, layer in layers.items():
            if isinstance(layer, GemmLayer):
                layers[name] = intercepted(layer, _Recorder(layer, inputs, name))
        for batch in batches:
            model(*batch)
        return cls(inputs, policy, precision)

    def _rounded(self, spec: Spec) -> torch.dtype | None:
        """The 8-bit dtype of the layer's weight; None if it has more bits or no weight."""
        dtype = None if spec.kind == "group_norm" else self._policy.precision(spec.name, self._precision)[0]
        return dtype if dtype in MAX_8_BITS else None

    @torch.no_grad()
    def scale(self, spec: Spec) -> Tensor | None:
        """Factors (c,) of the layer's input channels with the smallest error; None if 1 is best or it is not 8-bit."""
        inputs, dtype = self._inputs.get(spec.name), self._rounded(spec)
        if (
            inputs is None
            or not self._policy.smoothing
            or dtype is None
            or self._policy.has_static_rows(spec, self._precision)
        ):
            return None
        weight = spec.make()[0]
        ranges = weight.abs().flatten(2).amax((0, 2)) if weight.dim() == 4 else weight.abs().amax(0)
        matrix, rows = _as_product(spec, weight, inputs.sample)
        exact, best = rows @ matrix.T, (float("inf"), None)
        for alpha in ALPHAS:
            smooth = inputs.largest.clamp_min(1e-5) ** -alpha * ranges.clamp_min(1e-5) ** (1 - alpha) if alpha else None
            error = (_rounded_product(rows, matrix, smooth, dtype) - exact).square().sum().item()
            best = min(best, (error, smooth), key=lambda pair: pair[0])
        smooth = best[1]
        return None if smooth is None else smooth / smooth.mean()

    @torch.no_grad()
    def rounding(self, spec: Spec) -> Tensor | None:
        """Factors and shifts (2,k) by which what makes the layer's input rounds it, or None.

        All columns share a scale, or those of each source do, whichever has the smaller error. Scales of single columns
        are as wide as what a few images had there, and others have more: they lost four points of IoU on the miniature
        for referring after eight images, one scale for all lost nothing.
        """
        inputs = self._inputs.get(spec.name)
        if inputs is None or not self._policy.has_static_rows(spec, self._precision):
            return None
        matrix, rows = _as_product(spec, spec.make()[0].detach().float(), inputs.sample)
        exact, best = rows @ matrix.T, (float("inf"), torch.empty(0))
        for widths in {(rows.shape[1],), inputs.widths}:
            rounding = torch.cat([_rounding_of(*part) for part in _split(inputs, widths)], dim=1)
            numbers = round_columns(rows, rounding).float() - rounding[1]
            product = numbers @ PackedWeight.pack((matrix / rounding[0])[None], torch.int8).unpack()[0].T
            best = min(best, ((product - exact).square().sum().item(), rounding), key=lambda pair: pair[0])
        return best[1]

    @torch.no_grad()
    def snr_db(self, spec: Spec, layer: Layer) -> float | None:
        """Signal-to-noise ratio in decibels of the 8-bit layer's products on the kept sample of its input."""
        inputs = self._inputs.get(spec.name)
        if inputs is None or not self._rounded(spec) or not isinstance(layer, GemmLayer):
            return None
        weight, bias = spec.make()
        plain = {"bias": None, "activation": None, "out_dtype": torch.float32}
        plain |= {name: value for name, value in (("norm", None), ("silu", False)) if hasattr(layer, name)}
        if isinstance(layer, Linear) and layer.input_rounding is not None and layer.bias is not None:
            plain["bias"] = layer.bias if bias is None else layer.bias - bias.to(layer.bias.device)  # of the shifts
        result = type(layer)(**{**vars(layer), **plain})(inputs.sample)
        exact = _product(spec, weight, inputs.sample)
        noise = (result - exact).square().sum()
        return (10 * torch.log10(exact.square().sum() / noise.clamp_min(1e-30))).item()


def _split(inputs: _LayerInput, widths: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """Least and largest numbers of so many channels each."""
    return zip(inputs.low.split(widths), inputs.high.split(widths), strict=True)


def _rounding_of(low: Tensor, high: Tensor) -> Tensor:
    """One factor and one shift for columns of these ranges, (2,columns); zero is a whole number, so it is exact."""
    least, most = (MARGIN * bound for bound in (low.min().clamp(max=0), high.max().clamp(min=0)))
    scale = (most - least).clamp_min(1e-5) / LEVELS
    shift = torch.round(LEAST - least / scale)
    return torch.stack([(1 / scale).expand(len(low)), shift.expand(len(low))])


def _product(spec: Spec, weight: Tensor, sample: Tensor) -> Tensor:
    if spec.kind == "linear":
        return sample @ weight.T
    x = to_nchw(sample)
    if spec.upsample:
        return to_nhwc(F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1))
    top, left, bottom, right = spec.settings["padding"]
    return to_nhwc(F.conv2d(F.pad(x, (left, right, top, bottom)), weight, stride=spec.settings["stride"]))


def _as_product(spec: Spec, weight: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    """The layer as a matrix product (im2col): weight (n, taps*c) and rows (positions, taps*c), channels last."""
    if spec.kind == "linear":
        return weight, sample.flatten(0, -2)
    height, width = weight.shape[2:]
    patches = F.unfold(to_nchw(sample), (height, width), padding=height // 2)[0]  # c*taps, positions
    rows = patches.view(weight.shape[1], height * width, -1).permute(2, 1, 0).flatten(1)
    return weight.permute(0, 2, 3, 1).flatten(1), rows


def _rounded_product(rows: Tensor, matrix: Tensor, smooth: Tensor | None, dtype: torch.dtype) -> Tensor:
    if smooth is not None:
        smooth = smooth.repeat(rows.shape[1] // len(smooth))
        rows, matrix = rows * smooth, matrix / smooth
    numbers, scales = rounded_rows(rows, dtype)
    return (numbers * scales) @ PackedWeight.pack(matrix[None], dtype).unpack()[0].T
