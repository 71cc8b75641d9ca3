"""Which parameters train at which learning rate and weight decay, by the rules of the original's three optimisers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from vpd_fast.errors import InputError
from vpd_fast.models import VPD


class Rule(NamedTuple):
    """The group of a parameter: its name, factor on the learning rate, and whether weights decay."""

    name: str
    lr_scale: float
    decay: bool


def _segmentation(name: str, parameter: Tensor, quirks: bool) -> Rule:
    """Apply mmcv's custom keys: the longest key in the name decides alone, among equally long ones the first.

    "norm" is as long as "unet" and comes first, so normalisations of the UNet's transformers train at the full rate.
    Other normalisations have no "norm" in their names, and decay.
    """
    if "encoder_vq" in name:  # with config.train_encoder, which the original does not have
        return Rule("encoder", 0.1, True)
    if "norm" in name:
        return Rule("norm", 0.1 if "unet" in name and not quirks else 1.0, False)
    return Rule("unet", 0.1, True) if "unet" in name else Rule("rest", 1.0, True)


def _referring(name: str, parameter: Tensor, quirks: bool) -> Rule:
    """The original writes a factor of 0.01 into the UNet's groups, which nothing reads: all train at the full rate."""
    if "unet" in name:
        return Rule("unet", 1.0 if quirks else 0.01, "norm" not in name)
    if "encoder_vq" in name:
        return Rule("encoder", 1.0 if quirks else 0.01, True)
    return Rule("rest", 1.0, "norm" not in name)


def _depth(name: str, parameter: Tensor, quirks: bool) -> Rule:
    """The original has no quirk here."""
    decay = parameter.dim() > 1 and not name.endswith(".bias")
    return Rule("unet", 0.01, decay) if "unet" in name else Rule("rest", 1.0, decay)


RULES: dict[str, Callable[[str, Tensor, bool], Rule]] = {
    "segmentation": _segmentation, "referring": _referring, "depth": _depth
}  # fmt: skip


def parameter_groups(
    model: VPD,
    *,
    lr: float,
    weight_decay: float,
    preset: str,
    quirks: bool = True,
    unet_lr_scale: float | None = None,
) -> list[dict[str, Any]]:
    """Sort parameters into groups for an optimiser: name, params, lr, weight_decay, lr_scale. Frozen ones are in none.

    lr: of what trains at the full rate. preset: "segmentation", "referring" or "depth", whose rules to follow.
    quirks: do what the original's code does; False: what it evidently means, see the rules. Depth has none.
    unet_lr_scale: factor on the learning rate of the whole UNet, in place of the rules'; None: theirs.

    Raises InputError.
    """
    if preset not in RULES:
        raise InputError(f"preset must be one of {', '.join(RULES)}, got {preset!r}")
    groups: dict[tuple[str, float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rule = RULES[preset](name, parameter, quirks)
        if unet_lr_scale is not None and "unet" in name:
            rule = rule._replace(lr_scale=unet_lr_scale)
        group = groups.setdefault(
            rule,
            {
                "name": rule.name if rule.decay else f"{rule.name}, no decay",
                "params": [],
                "lr": lr * rule.lr_scale,
                "weight_decay": weight_decay if rule.decay else 0.0,
                "lr_scale": rule.lr_scale,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())
