"""The layers of a fast model: a packed weight and how to call the fused operator with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor

from vpd_fast import ops
from vpd_fast.ops.packing import PackedWeight
from vpd_fast.ops.rounding import round_columns

L = TypeVar("L", bound="Layer")


@dataclass(frozen=True)
class Layer:
    """Tensors and settings of one layer; activations are (B,H,W,C) or (B,N,C)."""

    kind: ClassVar[str]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the layer by the names they are stored under."""
        tensors: dict[str, Tensor] = {}
        for field, value in vars(self).items():
            if isinstance(value, PackedWeight):
                parts = {"weight": value.data, "weight_scales": value.scales, "weight_sums": value.weight_sums}
                tensors |= {name: x for name, x in parts.items() if x is not None}
            elif isinstance(value, Tensor):
                tensors[field] = value
        return tensors

    def for_device(self, device: torch.device) -> Layer:
        """The same layer with its tensors on that device, its weight in the layout that kernels read there."""
        moved = {
            name: value.for_device(device) if isinstance(value, PackedWeight) else value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, PackedWeight | Tensor)
        }
        return replace(self, **moved)

    def settings(self) -> dict[str, Any]:
        """The settings of the layer and the sizes of its weight as plain values, for a JSON file."""
        values: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, PackedWeight):
                values |= {"n": value.n, "k": value.k}
            elif isinstance(value, torch.dtype):
                values[name] = str(value).removeprefix("torch.")
            elif not isinstance(value, Tensor):
                values[name] = value
        return values


@dataclass(frozen=True)
class GroupNorm(Layer):
    """Computes the scale and shift per channel that a group norm amounts to; the next layer applies them."""

    kind: ClassVar[str] = "group_norm"
    weight: Tensor
    bias: Tensor
    groups: int
    eps: float

    def __call__(self, x: Tensor, x2: Tensor | None = None, **options: Any) -> Tensor:
        """(B,H,W,C1) [and (B,H,W,C2)] -> (B,2,C1+C2) float32; options: statistics, ranges and what belongs to them."""
        return ops.group_norm_affine(x, x2=x2, **vars(self), **options)


@dataclass(frozen=True)
class GemmLayer(Layer):
    """Base of the layers that multiply by a packed weight, with what surrounds the product fused into it.

    The fields of a kind of layer are arguments of its operator, by the same names.
    out_dtype: dtype of the results. scale: (c,) factors of the input's channels (smoothing), whose inverses are in the
    weight. activation: None, "relu", "silu" or "geglu", applied to the product plus bias.
    """

    weight: PackedWeight
    bias: Tensor | None
    out_dtype: torch.dtype
    scale: Tensor | None = None
    activation: str | None = None

    @property
    def parts(self) -> int:
        """Number of sub-results computed one after the other (4 phases for upsampling, else 1)."""
        return 1

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the output for an input of this height and width."""
        return height, width

    def shape(self, x: Tensor) -> tuple[int, ...]:
        """(B,H,W,C) of the output for an input (B,H,W,C)."""
        n = self.weight.n // 2 if self.activation == "geglu" else self.weight.n
        return x.shape[0], *self.size(*x.shape[1:3]), n

    def __call__(self, x: Tensor, **options: Any) -> Tensor:
        """(B,...,k) -> (B,...,n); options: x2, affine, residual, out and, where a kind takes them, further ones."""
        raise NotImplementedError


@dataclass(frozen=True)
class Linear(GemmLayer):
    """Rows times a weight, with everything around it fused; see `vpd_fast.ops.linear`.

    input_rounding: (2,k) float32, factors and shifts by which what makes the layer's input rounds it to int8, for which
    weight and bias are made (`rounded_rows` of `build.py`); None: the layer rounds each row itself.
    """

    kind: ClassVar[str] = "linear"
    norm: str | None = None
    eps: float = 1e-5
    input_rounding: Tensor | None = None

    def __call__(self, x: Tensor, **options: Any) -> Tensor:
        """(B,...,k) -> (B,...,n); options: x2, affine, residual, out, statistics, bias, rounding, x_rounding, x_out."""
        shape = x.shape[:-1]
        if self.input_rounding is not None and x.dtype != torch.int8:
            x, options["x2"] = self._rounded(x, options.get("x2")), None
        for name in ("x2", "residual", "out", "x_out"):
            if options.get(name) is not None:
                options[name] = _rows(options[name])
        settings = {name: value for name, value in vars(self).items() if name != "input_rounding"}
        out = ops.linear(_rows(x), **{**settings, **options})
        return out.view(*shape, out.shape[-1])

    def _rounded(self, x: Tensor, x2: Tensor | None) -> Tensor:
        """The input as the weight expects it, where nobody has rounded it."""
        assert self.input_rounding is not None
        return round_columns(x if x2 is None else torch.cat([x.float(), x2.float()], dim=-1), self.input_rounding)


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 3 else x.flatten(1, 2)


@dataclass(frozen=True)
class Conv2d(GemmLayer):
    """Direct convolution, see `vpd_fast.ops.conv2d`; `upsample` convolves the enlarged image, by four phases."""

    kind: ClassVar[str] = "conv2d"
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)  # top, left, bottom, right
    upsample: bool = False
    silu: bool = False

    @property
    def parts(self) -> int:
        return 4 if self.upsample else 1

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the output for an input of this height and width."""
        if self.upsample:
            return 2 * height, 2 * width
        top, left, bottom, right = self.padding
        height, width = height + top + bottom - self.kernel[0], width + left + right - self.kernel[1]
        return height // self.stride + 1, width // self.stride + 1

    def __call__(self, x: Tensor, **options: Any) -> Tensor:
        """(B,H,W,C) -> (B,H',W',n); options: x2, affine, ranges, residual, out, statistics."""
        return ops.conv2d(x, **vars(self), **options)


@dataclass(frozen=True)
class Winograd(GemmLayer):
    """3x3 convolution of stride 1 by Winograd's algorithm; see `vpd_fast.ops.winograd_conv2d`."""

    kind: ClassVar[str] = "winograd_conv2d"
    upsample: bool = False
    silu: bool = False

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the output for an input of this height and width."""
        return (2 * height, 2 * width) if self.upsample else (height, width)

    def __call__(self, x: Tensor, **options: Any) -> Tensor:
        """(B,H,W,C) -> (B,H,W,n), or (B,2H,2W,n) if it upsamples; options: x2, affine, residual, out."""
        return ops.winograd_conv2d(x, **vars(self), **options)


class Layers(dict[str, Layer]):
    """The layers of a fast model by name, each as what it is."""

    def gemm(self, name: str) -> GemmLayer:
        """The layer of that name, which has a packed weight."""
        return cast("GemmLayer", self[name])

    def linear(self, name: str) -> Linear:
        """The layer of that name, which multiplies rows."""
        return cast("Linear", self[name])

    def norm(self, name: str) -> GroupNorm:
        """The group norm of that name."""
        return cast("GroupNorm", self[name])


def intercepted(layer: L, around: Callable[..., Any]) -> L:
    """Return the layer with the same tensors and of the same kind, whose calls are around(call, *args, **options).

    call: what the layer does by itself with such arguments.
    """
    kind = type(layer)

    def through(self: L, *args: Any, **options: Any) -> Any:
        return around(partial(kind.__call__, self), *args, **options)

    copy: Any = object.__new__(type(kind.__name__, (kind,), {"__call__": through}))
    vars(copy).update(vars(layer))
    return copy


OUT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS: dict[str, type[Layer]] = {cls.kind: cls for cls in (GroupNorm, Linear, Conv2d, Winograd)}


def from_parts(kind: str, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Layer:
    """Inverse of `Layer.tensors` and `Layer.settings`. Raises ValueError for a weight that its sizes do not fit."""
    settings, tensors = dict(settings), dict(tensors)
    if kind != GroupNorm.kind:
        data = tensors.pop("weight")
        sizes = settings.pop("n"), settings.pop("k")
        vectors = tensors.pop("weight_scales", None), tensors.pop("weight_sums", None)
        settings["weight"] = PackedWeight(data, *vectors, *sizes)
        settings["out_dtype"] = OUT_DTYPES[settings["out_dtype"]]
    return KINDS[kind](**{"bias": None, **settings, **tensors})
