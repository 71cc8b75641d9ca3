"""What the models accept: each check raises one InputError that says what came and what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vpd_fast.errors import InputError


def _tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise InputError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
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


def tokens(value: Tensor, expected: tuple[int, int], device: torch.device, dtype: torch.dtype) -> None:
    """Raises InputError unless tokens are (B,T,C) with (T,C) as expected, on device and of dtype."""
    _tensor("tokens", value)
    if value.dim() != 3 or tuple(value.shape[1:]) != expected:
        raise InputError(f"tokens must have shape (B, {expected[0]}, {expected[1]}), got {tuple(value.shape)}")
    _place("tokens", value, device, dtype)


def class_ids(value: Tensor, num_scenes: int, device: torch.device) -> None:
    """Raises InputError unless class_ids are (B,) int64 in [0, num_scenes), on device."""
    _tensor("class_ids", value)
    if value.dim() != 1 or value.dtype != torch.long:
        raise InputError(
            f"class_ids must have shape (B,) and dtype torch.int64, got {tuple(value.shape)} {value.dtype}"
        )
    _place("class_ids", value, device, None)
    if value.numel() and not 0 <= int(value.min()) <= int(value.max()) < num_scenes:
        raise InputError(f"class_ids must be in [0, {num_scenes}), got {value.tolist()}")


def same_batch(images: Tensor, value: Tensor, name: str) -> None:
    """Raises InputError unless `value` has one row per image."""
    if _tensor(name, value).shape[:1] != _tensor("images", images).shape[:1]:
        raise InputError(f"{name} must have one row per image ({images.shape[0]}), got shape {tuple(value.shape)}")


def feature_channels(features: Sequence[Tensor], expected: tuple[int, ...]) -> None:
    """Raises InputError unless features have the channels that the head was built for.

    Self-attention maps have one channel per position, so they depend on the image's size.
    """
    got = tuple(f.shape[1] for f in features)
    if got != expected:
        raise InputError(
            f"features must have {list(expected)} channels, got {list(got)}; "
            "self-attention maps fix the image size to base_size"
        )
