"""Libraries that compute attention without storing its probabilities, by the name that `VPD.attention_backend` takes.

"plain" stands for attention written out (attention.py, autoencoder.py). With any other name self-attention goes through
the library of that name, and what needs maps, or has a text as context, through `vpd_fast.ops.cross_attention_maps`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vpd_fast.errors import InputError, MissingDependencyError, brief

PLAIN = "plain"
FLASH_ATTN_MAX_HEAD_DIM = 256
_MODULES = {"xformers": "xformers.ops", "flash-attn": "flash_attn"}


def attention(backend: str, q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> Tensor:
    """Multi-head attention, q (B,N,heads*D), k and v (B,L,heads*D) -> (B,N,heads*D).

    backend: a name in BACKENDS except "plain". Raises InputError if its library cannot take these tensors.
    """
    reason = _why_not(backend, q, heads)
    if reason is not None:
        raise InputError(f"attention backend {backend!r} {reason}; 'sdpa' runs everywhere")
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    return _ATTENTION[backend](q, k, v, scale).flatten(2)


def check_backend(name: str) -> None:
    """Raises InputError for an unknown name, MissingDependencyError if the package behind it cannot be imported."""
    if not isinstance(name, str) or name not in BACKENDS:
        raise InputError(f"attention_backend must be one of {', '.join(map(repr, BACKENDS))}, got {brief(name)}")
    if name in _MODULES:
        try:
            importlib.import_module(_MODULES[name])
        except (ImportError, OSError) as error:  # OSError: its library was built for another PyTorch
            raise MissingDependencyError(
                f"attention_backend={name!r} needs `pip install 'vpd_fast[{name}]'` ({error})"
            ) from error


def _why_not(backend: str, q: Tensor, heads: int) -> str | None:
    """The reason why the library cannot take such queries; None if it can."""
    if backend == "sdpa":
        return None
    if q.device.type != "cuda":
        return f"needs a GPU, got tensors on {q.device}"
    dtypes = (torch.float16, torch.bfloat16) + ((torch.float32,) if backend == "xformers" else ())
    if q.dtype not in dtypes:
        return f"needs {' or '.join(map(str, dtypes))} (autocast gives it), got {q.dtype}"
    if backend == "flash-attn" and q.shape[-1] // heads > FLASH_ATTN_MAX_HEAD_DIM:
        return f"takes heads of at most {FLASH_ATTN_MAX_HEAD_DIM} channels, got {q.shape[-1] // heads}"
    return None


# q (B,N,heads,D), k and v (B,L,heads,D), scale -> (B,N,heads,D)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def _xformers(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

    return memory_efficient_attention(q, k, v, scale=scale)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    return flash_attn_func(q, k, v, softmax_scale=scale)


_ATTENTION: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "sdpa": _sdpa,
    "xformers": _xformers,
    "flash-attn": _flash_attn,
}
BACKENDS = (PLAIN, *_ATTENTION)
