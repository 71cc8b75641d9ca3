"""Arguments of the attention operators, and the implementations of attention with maps, forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor

from vpd_fast import _native
from vpd_fast.ops._attention_checks import maps_dtype
from vpd_fast.ops._categories import Categories, categories_of, category_addresses
from vpd_fast.ops._choices import WORDS, Shape
from vpd_fast.ops._dispatch import WRITTEN, SymInt, never_refuses
from vpd_fast.ops._layout import address_and_strides, dtype_name, last_contiguous, leading_strides
from vpd_fast.ops.availability import triton_missing
from vpd_fast.ops.rounding import put

if TYPE_CHECKING:
    from vpd_fast.ops.cross_attention_maps_backward import CrossAttentionMapsBackwardArguments


@dataclass(frozen=True)
class AttentionArguments:
    """Arguments that all attention operators share; see `cross_attention_maps`."""

    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    scale: float

    def public(self) -> dict[str, Any]:
        """Return the arguments of the public function that makes these."""
        return {name: getattr(self, name) for name in self.__match_args__}

    @property
    def sizes(self) -> tuple[int, ...]:
        """(batch, queries, tokens, heads, dimension of a head)."""
        return (*self.q.shape[:2], self.k.shape[1], self.heads, self.q.shape[2] // self.heads)

    @property
    def contiguous_qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, each copied if its last dimension is strided."""
        return last_contiguous(self.q), last_contiguous(self.k), last_contiguous(self.v)

    def native_arguments(self, *qkv: Tensor) -> tuple[Any, ...]:
        """What all native kernels of attention take; `qkv`: the tensors to read, with a last stride of 1."""
        batch, *sizes = self.sizes
        addresses, strides = tuple(x.data_ptr() for x in qkv), tuple(leading_strides(x) for x in qkv)
        return addresses, dtype_name(qkv[0]), (batch, self.k.shape[0], *sizes), strides, self.scale


@dataclass(frozen=True)
class MapsArguments(AttentionArguments):
    """Arguments that all operators with maps share; see `cross_attention_maps`.

    ids: (L,) integers, the category of each token, or None. num_maps: M, the number of categories or of tokens.
    mean: whether the map of a category is the mean over its tokens, otherwise the sum.
    """

    ids: Tensor | None
    num_maps: SymInt
    mean: bool
    weight: float

    def public(self) -> dict[str, Any]:
        """Return the arguments of the public function that makes these."""
        others = {name: value for name, value in super().public().items() if name not in ("ids", "num_maps", "mean")}
        count = None if self.ids is None else self.num_maps
        reduce = "mean" if self.mean else "sum"
        return others | {"categories": self.ids, "num_categories": count, "reduce": reduce}

    @property
    def categories(self) -> Categories | None:
        """The categories in the form that kernels read."""
        return None if self.ids is None else categories_of(self.ids, self.num_maps, self.mean)


@dataclass(frozen=True)
class CrossAttentionMapsArguments(MapsArguments):
    """Arguments of the operator; see the public function."""

    addend: Tensor | None
    need_maps: bool
    average_heads: bool


@dataclass(frozen=True)
class CrossAttentionMapsIntoArguments(MapsArguments):
    """Arguments of the operator; see the public function."""

    base: Tensor | None
    into: Annotated[Tensor, WRITTEN]
    accumulate: bool
    rounding: Tensor | None
    average_heads = True

    def public(self) -> dict[str, Any]:
        """Return the arguments of the public function that makes these."""
        values = super().public()
        return values | {"addend": values.pop("base")}

    @property
    def addend(self) -> Tensor | None:
        """The tensor to which maps are added."""
        return self.into if self.accumulate else self.base


Arguments = CrossAttentionMapsArguments | CrossAttentionMapsIntoArguments
# Each implementation fills out (B, N, heads * D), contiguous, and maps, unless they are None, of any strides.
Run = Callable[[Arguments, Tensor, "Tensor | None"], None]


def split_heads(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """(B, N, heads * D) -> (B, heads, N, D)."""
    return x.to(dtype).unflatten(-1, (heads, -1)).transpose(1, 2)


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for that kind of device; tensors without memory ("meta") know no autocast.

    PyTorch is not asked which kinds do: the question ends a compiled graph in some versions (2.11).
    """
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """The caller's tensors have been cast already; what an implementation computes must not be."""
    return torch.autocast(device.type, enabled=False) if autocast_enabled(device) else contextlib.nullcontext()


ROUNDING_REFUSED = "the result is to be rounded to int8, which this kernel does not do"


def _rounding_of(p: AttentionArguments) -> Tensor | None:
    return getattr(p, "rounding", None)


def _reference(p: Arguments, out: Tensor, maps: Tensor | None) -> None:
    q, k, v = (split_heads(x, p.heads, maps_dtype(p.q)) for x in (p.q, p.k, p.v))
    probabilities = torch.softmax(q @ k.transpose(-2, -1) * p.scale, dim=-1)
    put(out, (probabilities @ v).transpose(1, 2).flatten(2), _rounding_of(p))
    if maps is not None:
        _write_maps(p, probabilities.mean(1) if p.average_heads else probabilities, maps)


def _write_maps(p: Arguments, token_maps: Tensor, maps: Tensor) -> None:
    if p.categories is not None:
        token_maps = token_maps @ p.categories.matrix(token_maps.dtype)
    token_maps = token_maps * p.weight
    maps.copy_(token_maps if p.addend is None else p.addend + token_maps)


def _constant(p: Arguments, out: Tensor, maps: Tensor | None) -> None:
    """One token has all the attention whatever the query is."""
    put(out, p.v.expand(out.shape), _rounding_of(p))
    if maps is not None:
        _write_maps(p, torch.ones((1,) * maps.dim(), dtype=maps_dtype(p.q), device=p.q.device), maps)


def _constant_refuses(p: AttentionArguments) -> str | None:
    return None if p.k.shape[1] == 1 else f"there are {p.k.shape[1]} tokens, not one"


def cpu_refuses(p: AttentionArguments) -> str | None:
    """Returns why the native kernels of attention with maps cannot run here, or None."""
    if p.q.device.type != "cpu":
        return f"q is on {p.q.device}, not on the CPU"
    if p.q.dtype == torch.float64:
        return "q is float64"
    if _rounding_of(p) is not None:
        return ROUNDING_REFUSED
    return _native.why_missing("_C")


def _cpu(p: Arguments, out: Tensor, maps: Tensor | None) -> None:
    # There are no float16 kernels: they would be float32 ones with conversions.
    dtype = torch.float32 if p.q.dtype == torch.float16 else p.q.dtype
    q, k, v = (x.to(dtype) for x in p.contiguous_qkv)
    result = out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)
    # Maps of 16 bits are written as float32 first: few places ask for them, and only once for each level.
    target = maps if maps is None or maps.dtype == torch.float32 else torch.empty(maps.shape)
    _native.run(
        "cross_attention_maps",
        p.native_arguments(q, k, v),
        result.data_ptr(),
        address_and_strides(target),
        address_and_strides(p.addend),
        (category_addresses(p.categories), 0 if target is None else target.shape[-1], p.weight),
        p.average_heads,
        torch.get_num_threads(),
        _native.isa(),
    )
    if result is not out:
        out.copy_(result)
    if maps is not None and target is not None and target is not maps:
        maps.copy_(target)


def triton_refuses(p: AttentionArguments) -> str | None:
    """Returns why the Triton kernels of attention cannot run here, or None."""
    if p.q.dtype == torch.float64:
        return "q is float64"
    reason = triton_missing(p.q, "q")
    if reason is not None:
        return reason
    from vpd_fast.kernels import cross_attention_maps as kernels

    return kernels.refuse(p.q, p.k, p.v, p.heads)


def kernel_options(p: Arguments | CrossAttentionMapsBackwardArguments) -> dict[str, Any]:
    """The arguments that Triton kernels take by name."""
    names = ("heads", "scale", "weight", "categories", "average_heads")
    return {name: getattr(p, name) for name in names}


def _triton(p: Arguments, out: Tensor, maps: Tensor | None) -> None:
    from vpd_fast.kernels import cross_attention_maps as kernels

    rounding = last_contiguous(_rounding_of(p))
    kernels.forward(*p.contiguous_qkv, out, maps, p.addend, **kernel_options(p), rounding=rounding)


CUDA_DTYPES = (torch.bfloat16, torch.float16)
CUDA_SCHEDULE = "auto"  # or "heads_loop", "cluster", "split", see csrc/cuda/cross_attention_maps.h


def _cuda_refuses(p: AttentionArguments) -> str | None:
    q = p.q
    if q.device.type != "cuda":
        return f"q is on {q.device}, not on a GPU"
    if q.dtype not in CUDA_DTYPES:
        return f"q is {q.dtype}, not of 16 bits"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return f"{torch.cuda.get_device_name(q.device)} is older than compute capability 8.0"
    if _rounding_of(p) is not None:
        return ROUNDING_REFUSED
    missing = _native.why_missing("_C_cuda")
    if missing is not None:
        return missing
    for name, x in (("q", q), ("k", p.k), ("v", p.v)):
        # Tensors that are not laid out in rows are copied, and then they are aligned.
        if x.stride(-1) == 1 and (x.data_ptr() % 16 or any(step % 8 for step in leading_strides(x))):
            return f"{name} has rows that are not aligned to 16 bytes"
    if q.numel():
        try:
            _cuda_scratch(p, True, True)
        except ValueError as reason:
            return str(reason)
    return None


def _cuda_scratch(p: AttentionArguments, need_maps: bool, average_heads: bool) -> int:
    """Returns bytes of scratch memory. Raises ValueError with the reason if the kernel does not take such sizes."""
    return _native.load("_C_cuda").cross_attention_maps_scratch(
        dtype_name(p.q), p.sizes, need_maps, average_heads, CUDA_SCHEDULE, p.q.device.index
    )


def _cuda_arguments(p: Arguments, q: Tensor, k: Tensor, v: Tensor, out: Tensor, maps: Tensor | None) -> tuple[Any, ...]:
    """What all CUDA C++ kernels with maps take first; q, k and v: the tensors to read, with a last stride of 1."""
    categories = p.categories
    addresses = None
    if categories is not None:
        tensors = (categories.tokens, categories.offsets, categories.weights)
        addresses = (*(x.data_ptr() for x in tensors), categories.count)
    place = address_and_strides(maps)
    return (
        tuple(x.data_ptr() for x in (q, k, v, out)),
        dtype_name(q),
        p.sizes,
        tuple(leading_strides(x) for x in (q, k, v)),
        None if maps is None or place is None else (place[0], dtype_name(maps), place[1]),
        address_and_strides(p.addend),
        addresses,
        p.average_heads,
        p.scale,
        p.weight,
        CUDA_SCHEDULE,
    )


def _cuda(p: Arguments, out: Tensor, maps: Tensor | None) -> None:
    q, k, v = p.contiguous_qkv
    size = _cuda_scratch(p, maps is not None, p.average_heads)
    scratch = q.new_empty(size, dtype=torch.uint8)
    _native.load("_C_cuda").cross_attention_maps(
        *_cuda_arguments(p, q, k, v, out, maps),
        scratch.data_ptr() if size else 0,
        q.device.index,
        torch.cuda.current_stream(q.device).cuda_stream,
    )


def _wgmma_refuses(p: AttentionArguments) -> str | None:
    if _rounding_of(p) is not None:
        return ROUNDING_REFUSED
    from vpd_fast.kernels import _attention_cuda as kernel

    reason = kernel.refuse(p.q, p.k, p.v, p.heads, p.scale)
    if reason is None and getattr(p, "need_maps", True) and p.k.shape[1] > kernel.MAX_TOKENS:
        return f"there are {p.k.shape[1]} tokens; with maps this takes up to {kernel.MAX_TOKENS}"
    return reason


def _wgmma(p: Arguments, out: Tensor, maps: Tensor | None) -> None:
    from vpd_fast.kernels import _attention_cuda as kernel

    if maps is None:
        kernel.forward(p.q, p.k, p.v, out, heads=p.heads, scale=p.scale)
    else:
        q, k, v = kernel.readable_rows(p.q, p.k, p.v)
        kernel.forward_maps(_cuda_arguments(p, q, k, v, out, maps), q)


# (name, run, refuse), in order of preference.
IMPLEMENTATIONS: tuple[tuple[str, Run, Callable[[AttentionArguments], str | None]], ...] = (
    ("constant", _constant, _constant_refuses),
    ("cuda", _cuda, _cuda_refuses),
    ("cpu", _cpu, cpu_refuses),
    ("triton", _triton, triton_refuses),
    ("wgmma", _wgmma, _wgmma_refuses),  # not measured yet: "triton" takes all that it does
    ("reference", _reference, never_refuses),
)


def shape_of(p: Arguments) -> Shape:
    """Returns what decides which implementation is fastest; sizes: rows of all images, tokens."""
    batch, queries, tokens, heads, dim = p.sizes
    key = f"{WORDS[p.q.dtype]} {heads}x{dim}"
    if tokens == 1:
        key += " one token"  # which has an implementation of its own
    if getattr(p, "need_maps", True):
        key += " maps" if p.average_heads else " maps of heads"
        key += "" if p.ids is None else " of categories"
    return Shape(key, (batch * queries, tokens))


def solve(run: Run, p: Arguments, out: Tensor, maps: Tensor | None) -> None:
    """Runs one implementation, unless there is nothing to compute."""
    if out.numel():
        with no_autocast(out.device):
            run(p, out, maps)
