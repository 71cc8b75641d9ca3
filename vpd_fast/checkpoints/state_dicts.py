"""Finds the state dict in what a file of torch.save holds: under which name, and whether it is an average."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from vpd_fast.checkpoints.names import is_averaged
from vpd_fast.checkpoints.pickles import Placeholder
from vpd_fast.errors import CheckpointError, brief

# The first that is there wins. Averages come last, and first where they are asked for.
_CONTAINERS = (
    "state_dict", "model", "model_state_dict", "module", "net", "network", "params", "model_state", "model_weights",
    "weights", "state", "net_state_dict", "model_params",
)  # fmt: skip
_AVERAGES = (
    "ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "ema", "params_ema", "ema_params", "ema_weights",
    "model_state_dict_ema", "ema_model_state_dict", "model_ema_state_dict", "averaged_model", "swa_model", "shadow",
)  # fmt: skip
_NO_MODEL = frozenset(
    {"optimizer", "optimizers", "optimizer_states", "optimizer_state_dict", "optim", "callbacks", "args"}
)
_MAX_NESTED = 4


def find_state_dict(value: Any, averaged: bool = False) -> tuple[Mapping[Any, Any], dict[str, Any], bool]:
    """Return (the state dict in `value`, what else is there, whether these are the averages asked for).

    averaged: of the averages over the training, if the file has them beside the weights; if it does not, the names in
    the state dict must tell. Raises CheckpointError where there is none, or it cannot be told which.
    """
    metadata: dict[str, Any] = {}
    wanted = averaged
    for _ in range(_MAX_NESTED):
        if not isinstance(value, dict):
            break
        # Files of mmengine have the averages in the place of the weights, and those where others have averages.
        swapped = isinstance(value.get("meta"), dict) and "mmengine_version" in value["meta"]
        wanted = wanted and not swapped
        name = _container(value, wanted)
        if name is None:
            break
        wanted = wanted and not is_averaged(name)
        metadata |= {str(key): item for key, item in value.items() if key != name}
        value = value[name]
    if isinstance(value, Placeholder):
        raise CheckpointError(
            f"holds a pickled object of class {value.name[:200]}, which is not rebuilt; expected its state dict "
            "(save model.state_dict() where the class is available)"
        )
    if not isinstance(value, dict):
        raise CheckpointError(f"holds a {type(value).__name__}; expected a state dict")
    if not _named_tensors(value):
        raise CheckpointError(f"no tensors in its state dict (entries: {_listed(value) or 'none'})")
    return value, metadata, averaged and not wanted


def _container(value: Mapping[Any, Any], averaged: bool) -> str | None:
    """Return the name of the entry that holds the weights, None where `value` does so itself."""
    names = (*_AVERAGES, *_CONTAINERS) if averaged else (*_CONTAINERS, *_AVERAGES)
    full = next((name for name in names if _holds_tensors(value.get(name))), None)
    if full is not None:
        return full
    if _named_tensors(value):
        return None
    kept = [
        key for key, item in value.items() if isinstance(key, str) and key not in _NO_MODEL and _holds_tensors(item)
    ]
    if len(kept) > 1:
        raise CheckpointError(
            f"holds several state dicts ({_listed(kept)}); expected one under a usual name, such as model"
        )
    return kept[0] if kept else next((name for name in names if isinstance(value.get(name), (dict, Placeholder))), None)


def _named_tensors(value: Mapping[Any, Any]) -> bool:
    return any(isinstance(key, str) and isinstance(item, Tensor) for key, item in value.items())


def _holds_tensors(value: Any) -> bool:
    """Return whether this is a state dict, or a container of one by a usual name."""
    layer, seen = [value], set[int]()  # each once: they may be shared
    for _ in range(_MAX_NESTED):
        layer = [item for item in layer if isinstance(item, dict) and id(item) not in seen]
        if any(_named_tensors(item) for item in layer):
            return True
        seen |= {id(item) for item in layer}
        layer = [item.get(name) for item in layer for name in (*_CONTAINERS, *_AVERAGES)]
    return False


def _listed(keys: Iterable[Any]) -> str:
    return ", ".join(str(key)[:60] if isinstance(key, str) else brief(key) for key in list(keys)[:5])
