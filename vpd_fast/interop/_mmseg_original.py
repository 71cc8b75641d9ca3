"""The model section of the original repository's segmentation configs, as arguments of our segmentor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vpd_fast.errors import InputError, brief

# What the network has, by the names of mmseg's FPN, FPNHead and CrossEntropyLoss.
_NECK = {"type": "FPN", "num_outs": 4}
_HEAD = {
    "type": "FPNHead", "in_index": [0, 1, 2, 3], "feature_strides": [4, 8, 16, 32], "dropout_ratio": 0.1,
    "align_corners": False,
}  # fmt: skip
_LOSS = {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0}
_UNET = ("base_size", "use_attn", "attn_selector", "max_attn_size")


def settings_of(neck: Any, decode_head: Any, unet_config: Any) -> tuple[int | None, dict[str, Any], dict[str, Any]]:
    """Return num_classes, settings and what train_cfg gets. Raises InputError for what VPD's network does not have."""
    neck, head = _section("neck", neck), _section("decode_head", decode_head)
    unet = _section("unet_config", unet_config)
    loss = _section("decode_head.loss_decode", head.pop("loss_decode", None))
    norm = _section("decode_head.norm_cfg", head.pop("norm_cfg", None)).get("type", "BN")
    for section in (neck, head):
        section.pop("in_channels", None)  # which follow from the settings
    count, width = head.pop("num_classes", None), neck.pop("out_channels", None)
    channels = head.pop("channels", width)
    if width not in (None, channels):
        raise InputError(
            f"neck.out_channels is {width} and decode_head.channels {channels}: give both the same, VPD has one width"
        )
    if norm not in ("BN", "SyncBN"):
        raise InputError(
            f"decode_head.norm_cfg.type={brief(norm)}: VPD's has batch norm; give BN, which sync_bn='torch' of the "
            "config synchronises"
        )
    ignored_in_mean = not loss.pop("avg_non_ignore", False)
    for name, values, known in (("neck", neck, _NECK), ("decode_head", head, _HEAD), ("loss_decode", loss, _LOSS)):
        _require_known(name, values, known)
    unknown = [key for key in unet if key not in _UNET]
    if unknown:
        raise InputError(f"unet_config.{unknown[0]} is not a setting; expected {', '.join(_UNET)}")
    settings = unet if channels is None else {**unet, "channels": channels}
    return count, settings, {"ignored_in_mean": ignored_in_mean}


def _section(name: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise InputError(f"{name} must be a dict, got {brief(value)}")
    return dict(value or {})


def _require_known(name: str, values: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for key, value in values.items():
        plain = list(value) if isinstance(value, (list, tuple)) else value
        if key not in known or known[key] != plain:
            wanted = f"VPD's has {known[key]!r}" if key in known else f"VPD's has {', '.join(known)}"
            raise InputError(f"{name}.{key}={brief(plain)}: {wanted}; take the line out, or use another segmentor")
