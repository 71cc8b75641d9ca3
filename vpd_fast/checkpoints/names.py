"""The names of weights, freed from what wrappers and training frameworks put before and into them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from vpd_fast.errors import CheckpointError

T = TypeVar("T")

# Parts of names that say how a module was wrapped, wherever they stand: DistributedDataParallel and averaged models,
# torch.compile, FSDP, activation checkpointing, Lightning Fabric and DeepSpeed, Opacus, FairScale.
WRAPPER_PARTS = frozenset(
    """
    module _orig_mod _fsdp_wrapped_module _checkpoint_wrapped_module _forward_module _original_module
    _orig_module _module _fpw_module
    """.split()  # noqa: SIM905
)
_AVERAGED = re.compile(r"(^|[._])(ema|averaged?|swa|shadow)([._]|$)")


def is_averaged(name: str) -> bool:
    """Return whether a container or the first part of names says that the weights are averages over the training."""
    return _AVERAGED.search(name) is not None


def without_wrappers(tensors: Mapping[str, T]) -> dict[str, T]:
    """Drop the wrappers' parts from all names. Raises CheckpointError where two names become one."""
    return _renamed(tensors, {key: _clean(key) for key in tensors}, "without the parts that wrappers add")


def without_root(tensors: Mapping[str, T], root: str) -> dict[str, T]:
    """Drop `root` where a name begins with it; others stay. Raises CheckpointError where two names become one."""
    return _renamed(tensors, {key: key.removeprefix(root) for key in tensors}, f"without {root!r} before them")


def below(tensors: Mapping[str, T], root: str) -> dict[str, T]:
    """Return what is called `root` and something, by that something."""
    return {key[len(root) :]: tensor for key, tensor in tensors.items() if key.startswith(root)}


def _clean(key: str) -> str:
    kept = [part for part in key.split(".") if part not in WRAPPER_PARTS]
    return ".".join(kept) or key


def _renamed(tensors: Mapping[str, T], names: Mapping[str, str], how: str) -> dict[str, T]:
    renamed: dict[str, T] = {}
    first: dict[str, str] = {}
    for key, tensor in tensors.items():
        name = names[key]
        if name in renamed:
            raise CheckpointError(f"two weights have the same name {how}: {first[name]} and {key}")
        renamed[name], first[name] = tensor, key
    return renamed


def roots(keys: Iterable[str], signatures: Iterable[tuple[str, ...]]) -> list[str]:
    """Return what stands before the names of a known model, such as "model." of Lightning, for each that is there.

    signatures: names that all must be there, by one of which a model is known. Sorted, shortest first.
    """
    keys = frozenset(keys)
    found: set[str] = set()
    for signature in signatures:
        first = signature[0]
        ends = [key for key in keys if key == first or key.endswith(f".{first}")]
        candidates = {key[: len(key) - len(first)] for key in ends}
        found |= {root for root in candidates if all(root + name in keys for name in signature)}
    return sorted(found, key=lambda root: (len(root), root))


def choose_root(found: list[str], averaged: bool) -> str | None:
    """Return the root of the weights asked for out of several copies in one file, None where there is none.

    Raises CheckpointError where it cannot be told.
    """
    fitting = [root for root in found if is_averaged(root) == averaged]
    if not averaged and not fitting:
        fitting = found  # a file with averages alone
    if "" in fitting:
        return ""
    if len(fitting) > 1:
        copies = ", ".join(root.removesuffix(".") for root in fitting[:4])
        raise CheckpointError(f"holds several models ({copies}); expected one, or one and its averages")
    return fitting[0] if fitting else None


def ldm_averages(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the averages that Stable Diffusion's original code keeps of what begins with `prefix`, by its names.

    They are called "model_ema." and the name without "model." and without dots. {} where there are none.
    """
    pairs = {
        key: "model_ema." + key.removeprefix("model.").replace(".", "") for key in tensors if key.startswith(prefix)
    }
    return {key: tensors[shadow] for key, shadow in pairs.items() if shadow in tensors}
