"""What the models accept: each check raises one InputError that says what came and what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vpd_fast.errors import InputError, brief

MAX_BATCH = 1 << 31


def _tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise InputError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        raise InputError(f"{name} must be a dense tensor, got {'a nested one' if value.is_nested else value.layout}")
    return value


def _place(name: str, value: Tensor, device: torch.device, dtype: torch.dtype | None) -> None:
    if value.device != device:
        raise InputError(f"{name} must be on the model's device {device}, got {value.device}")
    # Under autocast the weights are cast on use, so any floating dtype is fine.
    if (
        dtype is not None
        and value.dtype != dtype
        and not (value.is_floating_point() and torch.is_autocast_enabled(device.type))
    ):
        raise InputError(f"{name} must have the model's dtype {dtype}, got {value.dtype}")


def images(value: Tensor, device: torch.device, dtype: torch.dtype, multiple: int) -> None:
    """Raises InputError unless images are (B,3,H,W) on device, of dtype, H and W positive multiples of `multiple`."""
    _tensor("images", value)
    if value.dim() != 4 or value.shape[1] != 3:
        raise InputError(f"images must have shape (B, 3, H, W), got {tuple(value.shape)}")
    height, width = value.shape[2:]
    if height % multiple or width % multiple or not height or not width:
        raise InputError(
            f"images must have a height and width that are multiples of {multiple}, got {height}x{width}; "
            "predict() takes any size"
        )
    _place("images", value, device, dtype)


def latents(value: Tensor, channels: int, multiple: int, device: torch.device, dtype: torch.dtype) -> None:
    """Raises InputError unless latents are (B,channels,h,w) on device, of dtype, h and w multiples of `multiple`."""
    shape = _tensor("latents", value).shape
    if len(shape) != 4 or shape[1] != channels or any(not size or size % multiple for size in shape[2:]):
        raise InputError(
            f"latents must have shape (B, {channels}, h, w), h and w multiples of {multiple}, got {tuple(shape)}"
        )
    _place("latents", value, device, dtype)


def context(value: Tensor, batch: int, width: int, device: torch.device, dtype: torch.dtype) -> None:
    """Raises InputError unless the context is (batch or 1,L,width) on device and of dtype."""
    shape = _tensor("context", value).shape
    if len(shape) != 3 or shape[0] not in (1, batch) or not shape[1] or shape[2] != width:
        raise InputError(f"context must have shape ({batch} or 1, L, {width}), got {tuple(shape)}")
    _place("context", value, device, dtype)


def tokens(value: Tensor, expected: tuple[int, int], device: torch.device, dtype: torch.dtype) -> None:
    """Raises InputError unless tokens are (B,T,C) with (T,C) as expected, on device and of dtype."""
    _tensor("tokens", value)
    if value.dim() != 3 or tuple(value.shape[1:]) != expected:
        raise InputError(f"tokens must have shape (B, {expected[0]}, {expected[1]}), got {tuple(value.shape)}")
    _place("tokens", value, device, dtype)


def class_ids(value: Tensor, num_scenes: int, device: torch.device) -> None:
    """Raises InputError unless class_ids are (B,) int64 in [0, num_scenes), on device.

    Under torch.compile, whose graph would end where values are looked at, the device itself asserts their range.
    """
    _tensor("class_ids", value)
    if value.dim() != 1 or value.dtype != torch.long:
        raise InputError(
            f"class_ids must have shape (B,) and dtype torch.int64, got {tuple(value.shape)} {value.dtype}"
        )
    _place("class_ids", value, device, None)
    inside = ((value >= 0) & (value < num_scenes)).all()
    if torch.compiler.is_compiling():
        torch.ops.aten._assert_async.msg(inside, f"class_ids must be in [0, {num_scenes})")
    elif not inside:
        raise InputError(f"class_ids must be in [0, {num_scenes}), got {value.tolist()}")


def same_batch(images: Tensor, value: Tensor, name: str) -> None:
    """Raises InputError unless `value` has one row per image."""
    if _tensor(name, value).shape[:1] != _tensor("images", images).shape[:1]:
        raise InputError(f"{name} must have one row per image ({images.shape[0]}), got shape {tuple(value.shape)}")


def features_of_levels(features: Sequence[Tensor], levels: int) -> None:
    """Raises InputError unless features are (B,C,h,w), one of each level."""
    if not isinstance(features, (list, tuple)) or len(features) != levels:
        raise InputError(f"features must be a list of {levels} tensors, got {brief(type(features).__name__)}")
    for i, feature in enumerate(features):
        if _tensor(f"features[{i}]", feature).dim() != 4:
            raise InputError(f"features[{i}] must have shape (B, C, h, w), got {tuple(feature.shape)}")


def feature_channels(features: Sequence[Tensor], expected: tuple[int, ...]) -> None:
    """Raises InputError unless features have the channels that the head was built for.

    Self-attention maps have one channel per position, so they depend on the image's size.
    """
    features_of_levels(features, len(expected))
    got = tuple(f.shape[1] for f in features)
    if got != expected:
        raise InputError(
            f"features must have {list(expected)} channels, got {list(got)}; "
            "self-attention maps fix the image size to base_size"
        )


def _is_int(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def size(value: tuple[int, int] | None) -> None:
    """Raises InputError unless it is None or (height, width), positive integers."""
    good = isinstance(value, Sequence) and len(value) == 2 and all(_is_int(n) and n > 0 for n in value)
    if value is not None and not good:
        raise InputError(f"size must be None or (height, width), two positive integers, got {brief(value)}")


def batch_size(value: int) -> None:
    """Raises InputError unless it is a number of images."""
    if not _is_int(value) or not 0 <= value < MAX_BATCH:
        raise InputError(f"batch_size must be an integer from 0 to {MAX_BATCH - 1}, got {brief(value)}")
