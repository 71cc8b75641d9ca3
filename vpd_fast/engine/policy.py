"""Which layer runs in which precision and by which algorithm, and why."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from vpd_fast.config import PRECISIONS as DTYPES
from vpd_fast.errors import InputError, brief

if TYPE_CHECKING:
    from vpd_fast.engine.specs import Spec

PRECISIONS: dict[str, torch.dtype] = {name: getattr(torch, dtype) for name, dtype in DTYPES.items()}
# What the layers of an engine of that precision hand to each other.
ACTIVATIONS = PRECISIONS | {"int8": torch.bfloat16, "fp8": torch.bfloat16}
NAMES = {dtype: name for name, dtype in PRECISIONS.items()}

# Of an engine of 8 bits: patterns of layer names -> precision and the reason. The first that fits decides.
EXCEPTIONS = {
    "encoder.conv_in": ("bf16", "3 input channels: little work, and its error goes through the whole network"),
    "encoder.conv_out": ("bf16", "makes the latents: little work"),
    "encoder.*.downsample": ("bf16", "nothing bypasses it, so all of its error stays; measured the most sensitive"),
    "unet.conv_in": ("bf16", "4 input channels: little work"),
    "head.*": ("bf16", "makes the result, and is 1 % of the work"),
    "*.attn2.kv": ("bf16", "runs once per text"),
}
MIN_WINOGRAD_SIDE = {torch.float32: 32, torch.bfloat16: 16, torch.int8: 16}  # positions a side of the output


@dataclass(frozen=True)
class Policy:
    """Choices of `optimize` that one may want to make oneself.

    precisions: patterns of layer names (as `report()` shows them; * and ? as in file names) -> one of those of
        `optimize`, the first that fits decides; before the defaults.
    winograd: let 3x3 convolutions run as Winograd convolutions where that is faster, which is on CPUs only. They take
        16/9 of the memory of a direct convolution's weights, in float32 4 times.
    smoothing: with calibration, even out the ranges of the input channels of 8-bit layers.
    static_rows: on GPUs, with calibration, let attention and the feed-forward's first layer round their results to
        int8, by scales that the calibration images give, for the int8 layers that read them, which then launch nothing
        but their product. Larger activations than those images have (by more than a quarter) are cut off. Not measured
        on a GPU yet.
    emulate: allow precisions that the device has no instructions for. Their layers are computed in float32 with the
        same rounding, slowly: for the accuracy of an engine before one has the device.
    """

    precisions: Mapping[str, str] = field(default_factory=dict)
    winograd: bool = True
    smoothing: bool = True
    static_rows: bool = False
    emulate: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.precisions, Mapping):
            raise InputError(f"policy.precisions must map layer names to precisions, got {brief(self.precisions)}")
        for pattern, precision in self.precisions.items():
            if not isinstance(pattern, str) or not isinstance(precision, str) or precision not in PRECISIONS:
                expected = ", ".join(PRECISIONS)
                raise InputError(
                    f"policy.precisions[{brief(pattern)}] must be one of {expected}, got {brief(precision)}"
                )

    def precision(self, name: str, default: str) -> tuple[torch.dtype, str]:
        """Dtype of the weight of layer `name` in an engine of precision `default`, and the reason."""
        chosen = {pattern: (precision, f"policy: {pattern}") for pattern, precision in self.precisions.items()}
        exceptions = EXCEPTIONS if PRECISIONS[default].itemsize == 1 else {}
        for pattern, (precision, reason) in (*chosen.items(), *exceptions.items()):
            if fnmatch.fnmatchcase(name, pattern):
                return PRECISIONS[precision], reason
        return PRECISIONS[default], ""

    def winograd_matrices(
        self, side: int, channels: int, dtype: torch.dtype, upsample: bool, device: str
    ) -> tuple[int, str]:
        """Matrices of the Winograd weight of a 3x3 convolution of stride 1, 0 if it runs directly, and the reason.

        side: height of the output at the model's image size. device: "cpu" or "cuda".
        """
        if device != "cpu":
            return 0, "no Winograd kernel for GPUs"
        if not self.winograd:
            return 0, "policy: winograd=False"
        if dtype not in MIN_WINOGRAD_SIDE:
            return 0, f"no Winograd kernel for {NAMES[dtype]}"
        if upsample:
            return 9, "upsampled image is never made"
        if channels % 16:
            return 0, f"{channels} channels do not fill vectors"
        if side < MIN_WINOGRAD_SIDE[dtype]:
            return 0, f"reading a larger weight costs more than {side}x{side} positions save"
        return (36, "F(4x4)") if dtype == torch.float32 else (16, "F(2x2): larger tiles lose accuracy below float32")

    def check_device(self, precision: str, device: torch.device) -> None:
        """Raises InputError if the device has no instructions for that precision, or for one of `precisions`."""
        for name in () if self.emulate else (precision, *self.precisions.values()):
            reason = _why_not(name, device)
            if reason is not None:
                raise InputError(
                    f'precision "{name}" does not run on {device}: {reason}; use "bf16" or "int8", or '
                    "Policy(emulate=True) to find its accuracy, slowly"
                )

    def has_static_rows(self, spec: Spec, precision: str) -> bool:
        """Whether, in an engine of `precision`, what makes the input of that layer rounds it."""
        return self.static_rows and spec.static_rows and self.precision(spec.name, precision)[0] == torch.int8

    def check_static_rows(self, precision: str, device: torch.device, is_calibrated: bool) -> None:
        """Raises InputError if static rows are asked for where there are none."""
        if not self.static_rows:
            return
        if precision != "int8":
            raise InputError(f'policy.static_rows is for precision "int8", not {precision!r}')
        if not is_calibrated:
            raise InputError("policy.static_rows needs the ranges of activations: optimize(model, calibration=images)")
        if device.type == "cpu" and not self.emulate:
            raise InputError(
                "policy.static_rows is for GPUs: on a CPU rows are rounded while they are in the cache; use "
                "Policy(emulate=True) to find its accuracy, slowly"
            )

    def check_names(self, names: list[str]) -> None:
        """Raises InputError if a pattern fits no layer with a precision: it would be silently ignored."""
        for pattern in self.precisions:
            if not fnmatch.filter(names, pattern):
                raise InputError(
                    f"policy.precisions: {pattern!r} fits no layer; layers are {', '.join(names[:5])}, ..."
                )


def _why_not(precision: str, device: torch.device) -> str | None:
    if device.type == "cpu":
        reasons = {"fp16": "no CPU computes in it faster than in bf16", "fp8": "no CPU has instructions for it"}
        return reasons.get(precision)
    if precision == "fp8" and torch.cuda.get_device_capability(device) < (8, 9):
        return f"{torch.cuda.get_device_name(device)} has no instructions for it (compute capability 8.9 has)"
    return None
