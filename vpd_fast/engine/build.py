"""From a specification to a layer: rounded, packed, and with the algorithm and the reasons written down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vpd_fast.engine.layers import Conv2d, GemmLayer, GroupNorm, Layer, Linear, Winograd
from vpd_fast.engine.policy import NAMES, Policy
from vpd_fast.engine.rewrites import phase_weights
from vpd_fast.engine.specs import Spec
from vpd_fast.errors import InputError
from vpd_fast.models.finite import all_finite, why_not_finite
from vpd_fast.ops.packing import PackedWeight
from vpd_fast.ops.winograd_conv2d import winograd_weight

PHASES = "2x2 for each of 4 phases"
ALGORITHMS = {0: "direct", 9: "Winograd F(2x2), upsampling", 16: "Winograd F(2x2)", 36: "Winograd F(4x4)"}


@dataclass(frozen=True)
class LayerInfo:
    """A row of the report: precision, algorithm and rewrites of a layer, and the reason.

    shape: that of the weight before it was packed. snr_db: signal-to-noise ratio of the layer's result in this
    precision on the calibration images.
    """

    name: str
    kind: str
    precision: str
    shape: tuple[int, ...]
    algorithm: str
    bytes: int
    rewrites: tuple[str, ...] = ()
    reason: str = ""
    snr_db: float | None = None


@torch.no_grad()
def build_layer(
    spec: Spec,
    precision: str,
    policy: Policy,
    out_dtype: torch.dtype,
    scale: Tensor | None = None,
    device: str | None = None,
    rounding: Tensor | None = None,
) -> tuple[Layer, LayerInfo]:
    """The layer of `spec` in an engine of `precision`, on the device of its weight.

    out_dtype: dtype of the activations. scale: (c,) factors of the input's channels; the weight is divided by them.
    device: "cpu" or "cuda", the kind of device that the layer is for; None: that of the weight. rounding: of its input,
    if what makes that rounds it; for linear layers of int8, instead of `scale`.
    """
    weight, bias = spec.make()
    weight, bias = weight.detach(), None if bias is None else bias.detach().float().clone()
    if bias is not None and spec.kind == "group_norm":
        layer: Layer = GroupNorm(weight.float().clone(), bias, **spec.settings)
        _require_finite(spec.name, layer, weight)
        return layer, LayerInfo(spec.name, GroupNorm.kind, "fp32", tuple(weight.shape), "statistics", 2 * weight.nbytes)
    dtype, reason = policy.precision(spec.name, precision)
    shape = tuple(weight.shape)
    if scale is not None:
        weight = weight / scale.view(1, -1, *[1] * (weight.dim() - 2))
    settings: dict[str, Any] = dict(spec.settings)
    if spec.kind == "linear":
        kind: type[GemmLayer] = Linear
        if rounding is not None:
            weight, settings["input_rounding"] = weight.float() / rounding[0], rounding
            reason = "; ".join(filter(None, (reason, "input rounded by what makes it")))
        packed, algorithm = PackedWeight.pack(weight[None].float(), dtype), "matrix product"
    else:
        matrices, choice = 0, f"stride {settings['stride']}"
        if spec.upsample or (settings["stride"] == 1 and shape[2:] == (3, 3) and spec.side):
            device = device or weight.device.type
            matrices, choice = policy.winograd_matrices(spec.side, shape[1], dtype, spec.upsample, device)
        kind, packed, settings = _convolution(weight, matrices, dtype, settings, spec.upsample)
        algorithm = PHASES if spec.upsample and not matrices else ALGORITHMS[matrices]
        reason = "; ".join(filter(None, (choice if spec.side else "", reason)))
    if rounding is not None:
        shifted = packed.unpack()[0] @ rounding[1]
        bias = -shifted if bias is None else bias - shifted
    layer = kind(packed.for_device(weight.device), bias, out_dtype, scale, **settings)
    _require_finite(spec.name, layer, weight)
    info = LayerInfo(
        spec.name, kind.kind, NAMES[dtype], shape, algorithm, sum(t.nbytes for t in layer.tensors().values()),
        spec.rewrites, reason,
    )  # fmt: skip
    return layer, info


def _require_finite(name: str, layer: Layer, weight: Tensor) -> None:
    """Raises InputError for a weight that was not finite, or is not in the layer's dtype."""
    for part, tensor in layer.tensors().items():
        if not all_finite(tensor):
            made_of = weight if part == "weight" else tensor
            raise InputError(f"layer {name}: its {part} {why_not_finite(tensor, made_of)}")


def _convolution(
    weight: Tensor, matrices: int, dtype: torch.dtype, settings: dict[str, Any], upsample: bool
) -> tuple[type[GemmLayer], PackedWeight, dict[str, Any]]:
    if matrices or upsample:
        del settings["stride"], settings["padding"]
    if matrices:
        return Winograd, PackedWeight.pack(winograd_weight(weight, matrices), dtype), settings | {"upsample": upsample}
    if upsample:
        phases = phase_weights(weight).permute(0, 1, 3, 4, 2).flatten(2)
        phase_settings = {"kernel": (2, 2), "padding": (0, 0, 0, 0), "upsample": True}
        return Conv2d, PackedWeight.pack(phases.float(), dtype), settings | phase_settings
    rows = weight.permute(0, 2, 3, 1).flatten(1)
    return Conv2d, PackedWeight.pack(rows[None].float(), dtype), settings | {"kernel": tuple(weight.shape[2:])}
