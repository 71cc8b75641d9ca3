"""Exact, trainable stand-ins for what the modules of latent diffusion compute, on their own parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpd_fast.errors import InputError, described
from vpd_fast.models.attention_backends import attention
from vpd_fast.ops import cross_attention_maps, self_attention

PLACES = ("down", "mid", "up")
# Of what a module and its stand-in return for random numbers, the relative distance: roundings of a sum of thousands in
# float32 are below; in 16 bits, and on GPUs whose float32 products may be rounded to TF32, rounding is that of 8 bits.
MAX_DISTANCE, MAX_DISTANCE_ROUNDED = 1e-4, 2e-2


class Part:
    """Stands for `forward` of a module, and computes the same with its parameters."""

    method: ClassVar[str] = "forward"

    def __init__(self, name: str, module: Any) -> None:
        self.name, self.module = name, module

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the module returns."""
        raise NotImplementedError

    def example(self) -> tuple[Any, ...]:
        """A few random numbers as arguments."""
        raise NotImplementedError

    def random(self, *shape: int) -> Tensor:
        """Numbers of the module's dtype on its device, the same in each call."""
        parameter = next(self.module.parameters())
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(parameter)

    def outputs(self) -> tuple[list[Tensor], list[Tensor]]:
        """What the module and this return for the example."""
        arguments = self.example()
        with _same_random_numbers(self.random(1).device):
            expected = self.module.forward(*arguments)
        with _same_random_numbers(self.random(1).device):
            return [expected], [self.forward(*arguments)]

    def try_out(self) -> None:
        """Raises InputError if the module does not compute what this stands for."""
        hint = "it is not the module of latent diffusion that its parameters look like, and was left as it was"
        try:
            with torch.no_grad():
                expected, got = self.outputs()
                close = len(expected) == len(got) and all(map(_close, got, expected))
        except Exception as error:
            raise InputError(f"{self.name} cannot be tried out ({described(error)}): {hint}") from error
        if not close:
            raise InputError(f"{self.name} computes something else than expected: {hint}")


def _close(got: Tensor, expected: Tensor) -> bool:
    if got.shape != expected.shape:
        return False
    exact = expected.dtype in (torch.float32, torch.float64) and expected.device.type == "cpu"
    limit = MAX_DISTANCE if exact else MAX_DISTANCE_ROUNDED
    return bool((got.double() - expected.double()).norm() <= limit * expected.double().norm())


@contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[None]:
    """Dropout draws the same numbers in each of these, and others go on as if nothing had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


@contextmanager
def unchanged(store: Any) -> Iterator[dict[str, Any]]:
    """The attributes of a store of maps, or of any object, which are the same at the end."""
    before = dict(vars(store)) if hasattr(store, "__dict__") else {}
    try:
        yield before
    finally:
        if before:
            vars(store).clear()
            vars(store).update(before)


class Attention(Part):
    """Attention of the UNet. store: what its maps are handed to, averaged over heads, as by the original's hook."""

    def __init__(self, name: str, module: Any, store: Any, place: str, self_maps: bool) -> None:
        super().__init__(name, module)
        self.store, self.place, self.self_maps = store, place, self_maps

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x (B,N,C), context (B,L,C') or None -> (B,N,C)."""
        if mask is not None:
            raise InputError(f"{self.name} is accelerated and takes no attention mask: call vpd_fast.restore first")
        module, is_cross = self.module, context is not None
        source = x if context is None else context
        q, k, v = module.to_q(x), module.to_k(source), module.to_v(source)
        if self._wants_maps(q.shape[1], is_cross):
            # Where the original's maps carry a gradient, which is where blocks are not checkpointed, these do.
            out, maps = cross_attention_maps(q, k, v, module.heads, module.scale, map_grad=torch.is_grad_enabled())
            assert maps is not None
            self.store(maps.to(q.dtype), is_cross, self.place)
        elif is_cross:
            out, _ = cross_attention_maps(q, k, v, module.heads, module.scale, need_maps=False)
        elif torch.is_grad_enabled() or q.dtype not in (torch.float32, torch.bfloat16):
            out = attention("sdpa", q, k, v, module.heads, module.scale)
        else:
            out = self_attention(q, k, v, module.heads, module.scale)
        return module.to_out(out)

    def _wants_maps(self, positions: int, is_cross: bool) -> bool:
        if self.store is None or not (is_cross or self.self_maps):
            return False
        if torch._C._current_graph_task_id() != -1:
            return False  # recomputed in backward, by whose time the maps have been used
        return positions <= getattr(self.store, "max_size", positions) ** 2

    def example(self) -> tuple[Any, ...]:
        x = self.random(2, 4, self.module.to_q.in_features)
        return x, self.random(2, 3, self.module.to_k.in_features) if self.name.endswith("attn2") else None

    def outputs(self) -> tuple[list[Tensor], list[Tensor]]:
        """The results, and what the store was given of cross-attention; the store is left as it was."""
        if self.store is None:
            return super().outputs()
        arguments, results = self.example(), []
        kind = "self" if arguments[1] is None else "cross"
        with unchanged(self.store) as before:
            for forward in (self.module.forward, self.forward):
                self.store.step_store = {key: [] for key in before["step_store"]}
                with _same_random_numbers(self.random(1).device):
                    out = forward(*arguments)
                maps = self.store.step_store[f"{self.place}_{kind}"]
                results.append([out, *maps] if kind == "cross" or self.self_maps else [out])
        return results[0], results[1]


class KLAttention(Part):
    """Attention over all positions in the KL encoder."""

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,C,h,w)."""
        module = self.module
        h = module.norm(x)
        # SDPA would store the probabilities of strided channels, as NCHW convolutions give them.
        q, k, v = (conv(h).flatten(2).transpose(1, 2).contiguous() for conv in (module.q, module.k, module.v))
        out = attention("sdpa", q, k, v, heads=1, scale=x.shape[1] ** -0.5)
        return x + module.proj_out(out.transpose(1, 2).unflatten(2, x.shape[2:]))

    def example(self) -> tuple[Any, ...]:
        return (self.random(1, self.module.q.in_channels, 2, 2),)


class KLBlock(Part):
    """A residual block of the KL encoder."""

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """(B,in,h,w) -> (B,out,h,w)."""
        module = self.module
        h = module.conv1(F.silu(module.norm1(x)))
        if temb is not None:
            h = h + module.temb_proj(F.silu(temb))[:, :, None, None]
        h = F.silu(module.norm2(h))
        dropout: nn.Module | None = getattr(module, "dropout", None)
        h = module.conv2(h if dropout is None else dropout(h))
        for shortcut in ("nin_shortcut", "conv_shortcut"):
            if hasattr(module, shortcut):
                x = getattr(module, shortcut)(x)
        return x + h

    def example(self) -> tuple[Any, ...]:
        return self.random(1, self.module.conv1.in_channels, 4, 4), None
