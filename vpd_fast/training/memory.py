"""How much memory a training step needs, found without taking any: the step runs on tensors that have no contents."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from vpd_fast.config import SIZE_MULTIPLE, VPDConfig
from vpd_fast.models import VPD
from vpd_fast.tasks import TASKS

ENCODER_BYTES = {"plain": 0, "fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "fp8": 1}  # of a weight in its packed copy


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of tensors that were made while it was on and are still needed by something."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._known = {t.untyped_storage()._cdata for t in known}  # what was there before
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def bytes(self) -> int:
        """Return the bytes in use, of every storage once, however many tensors look at it."""
        return sum(size for reference, size in self._made.values() if not reference.expired())


def activation_bytes(model: VPD, *, batch_size: int, size: int, precision: str = "fp32") -> int:
    """Return the bytes that forward keeps for backward, from latents to the head's output at the image's size.

    model: on any device, also one of FakeTensors. size: of square images. precision: "fp32", or "bf16" for autocast.
    """
    config, dtype = model.config, model.dtype
    padded = -(-size // SIZE_MULTIPLE) * SIZE_MULTIPLE
    side = padded // 8
    latents = torch.zeros(batch_size, config.backbone.in_channels, side, side, dtype=dtype, device=model.device)
    if TASKS[config.task].takes_text:
        given: dict[str, Any] = {"tokens": latents.new_zeros(batch_size, config.tokens, config.backbone.context_dim)}
    else:
        given = {"batch_size": batch_size}
    with (
        LiveMemory([latents, *model.parameters(), *model.buffers()]) as live,
        torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"),
    ):
        result = model.decode(model.features(latents, model.context(**given)), (size, size))
        found = live.bytes()
    del result
    return found


def estimate_memory(
    config: VPDConfig,
    *,
    batch_size: int,
    size: int,
    precision: str = "fp32",
    attention_backend: str = "sdpa",
    checkpointing: bool | Iterable[int] = False,
    encoder: str = "fp32",
    amsgrad: bool = False,
) -> dict[str, int]:
    """Estimate the bytes of a training step: weights, gradients, optimizer, activations, encoder and their total.

    encoder: the frozen encoder's precision; its packed weights and three of its largest activations count. Not counted:
    what a backward pass needs for a moment, the caching of allocators, the program itself.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = VPD.empty(config)
    with FakeTensorMode():
        model = model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype)).train()  # on the CPU, but for the contents
        model.attention_backend = attention_backend
        model.gradient_checkpointing_enable(checkpointing)
        activations = activation_bytes(model, batch_size=batch_size, size=size, precision=precision)
        weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in model.backbone.encoder_vq.parameters())
    padded = -(-size // SIZE_MULTIPLE) * SIZE_MULTIPLE
    width = 4 if encoder in ("plain", "fp32") else 2
    largest = batch_size * config.backbone.vae_ch * padded**2 * width
    parts = {
        "weights": weights,
        "gradients": trained,
        "optimizer": trained * (3 if amsgrad else 2),
        "activations": activations,
        "encoder": 0 if config.train_encoder else frozen * ENCODER_BYTES[encoder] + 3 * largest,
    }
    return {**parts, "total": sum(parts.values())}
