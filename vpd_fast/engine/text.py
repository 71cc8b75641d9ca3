"""What the UNet needs of a text: keys and values of every cross-attention, computed once per text."""

from __future__ import annotations

import copy
import threading

import torch
from torch import Tensor

from vpd_fast.engine.blocks import Layers
from vpd_fast.engine.layers import Linear

Projected = dict[str, "tuple[Tensor, Tensor] | list[Linear]"]
MAX_TEXTS = 8


class TextMemo:
    """Projections of the last few texts; may be used by several threads at once."""

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._recent: list[tuple[Tensor, Projected]] = []
        self._lock = threading.Lock()

    def __call__(self, context: Tensor) -> Projected:
        """Context (B or 1,L,context_dim), the same for all images if 1 -> per transformer what its attn2 needs."""
        with self._lock:
            recent = list(self._recent)
        entry = next((k for k in recent if k[0].shape == context.shape and torch.equal(k[0], context)), None)
        if entry is None:
            entry = context.clone(), _project(self._layers, context)
        with self._lock:  # the last used is the last to go
            self._recent = [*(k for k in self._recent if k is not entry)][-MAX_TEXTS + 1 :] + [entry]
        return entry[1]

    def __deepcopy__(self, memo: dict) -> TextMemo:
        """Of the copied layers, and empty."""
        return TextMemo(copy.deepcopy(self._layers, memo))

    def __reduce__(self) -> tuple:
        return TextMemo, (self._layers,)


def _project(layers: Layers, context: Tensor) -> Projected:
    """{transformer: (keys, values)}; with one token {transformer: attn1.out with the result in its bias, per text}."""
    projected: Projected = {}
    for name, layer in layers.items():
        transformer, _, role = name.rpartition(".attn2.")
        if role == "kv":
            projected[transformer] = layer(context).chunk(2, dim=-1)
        elif role == "v":  # the probability of the only token is 1
            result = layers[f"{transformer}.attn2.out"](layer(context)).float()
            out = layers[f"{transformer}.attn1.out"]
            projected[transformer] = [out.with_bias(out.bias + row) for row in result[:, 0]]
    return projected
