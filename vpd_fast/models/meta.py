"""Modules without storage: their shapes, and no random numbers drawn for weights that a checkpoint replaces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class _NoRandomNumbers(TorchFunctionMode):
    """Makes initialisers no-ops. On the meta device some would make PyTorch import its compiler, for 150 MiB."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.normal_, Tensor.uniform_) or getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def on_meta_device() -> Iterator[None]:
    """Modules made in this context are on the meta device and not initialised; load them with assign=True."""
    with torch.device("meta"), _NoRandomNumbers():
        yield
