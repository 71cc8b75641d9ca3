"""How prediction runs a model: in evaluation mode, in batches, and with its attention maps kept if asked for."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from vpd_fast import _native
from vpd_fast.errors import InputError
from vpd_fast.forks import Lock, tell_of_one_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor, nn

    from vpd_fast.models.perceiver import Perceiver

T = TypeVar("T")
_lock = Lock()
_in_use: dict[Perceiver, tuple[list[nn.Module], int]] = {}  # modules to set back to training, and how many predict
GPU_BATCH = 8  # on a CPU larger batches only cost memory
SMALL_MODEL = 64 << 20  # bytes of weights; of those measured models of 5 MB gain by streams, and one of 1 GB loses
MAX_STREAMS = 8  # of the default: what is around the model needs processors, too
AUTO, MAX_AUTO_BATCH = "auto", 32  # beyond which a GPU computes no faster
BYTES_PER_PIXEL = 2048  # of a window: three maps of 256 channels in fp16, which the image encoder has at its full size


@contextmanager
def evaluating(model: Perceiver) -> Iterator[None]:
    """Set evaluation and inference mode; when the last of several threads is done, modules get their modes back."""
    tell_of_one_thread()
    with _lock:
        training, users = _in_use.get(model, ([], 0))
        if not users:
            modules = model.modules() if isinstance(model, torch.nn.Module) else ()  # a fast model has no modes
            training = [module for module in modules if module.training]
            for module in training:
                module.training = False
        _in_use[model] = training, users + 1
    try:
        with torch.inference_mode():
            yield
    finally:
        with _lock:
            training, users = _in_use.pop(model)
            if users > 1:
                _in_use[model] = training, users - 1
            else:
                for module in training:
                    module.training = True


def named_encoder(model: Perceiver) -> Any:
    """Return the text encoder that the model's configuration names, None where it names none."""
    name = model.config.text_encoder
    return None if name is None else _encoder(name, model.device)


@functools.lru_cache(maxsize=2)  # predictors come and go
def _encoder(name: str, device: torch.device) -> Any:
    from vpd_fast.models.text import TextEncoder

    return TextEncoder(name, device=device)


def truncation_notes(
    encoder: Any, *, classes: Sequence[str] = (), sentences: Sequence[str] = (), tokens: int = 0
) -> list[str]:
    """Return what a text encoder cuts off of class names or sentences, as notes; none if it cannot tell."""
    if classes:
        return encoder.class_notes(classes) if hasattr(encoder, "class_notes") else []
    return encoder.sentence_notes(sentences, tokens) if hasattr(encoder, "sentence_notes") else []


def batch_size_for(model: Perceiver, batch_size: int | str | None) -> int:
    """Return `batch_size`, or the default for the model's device. Raises InputError.

    "auto" is what the free memory of a GPU takes, MAX_AUTO_BATCH at most, and 1 on a CPU.
    """
    if batch_size is None or (batch_size == AUTO and model.device.type == "cpu"):
        return 1 if model.device.type == "cpu" else GPU_BATCH
    if batch_size == AUTO:
        free, _ = torch.cuda.mem_get_info(model.device)
        windows = int(free / (BYTES_PER_PIXEL * model.config.base_size**2))
        return min(max(windows, 1), MAX_AUTO_BATCH)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f'batch_size must be a positive int, "{AUTO}" or None, got {batch_size!r}')
    return batch_size


def streams_for(model: Perceiver, streams: int | None) -> int:
    """Return `streams`, or the default: for small fast models on a CPU as many as threads, MAX_STREAMS at most, else 1.

    Raises InputError for a number that is not positive, or above 1 for a model on a GPU.
    """
    on_cpu = model.device.type == "cpu"
    if streams is None:
        is_small = getattr(model, "nbytes", SMALL_MODEL + 1) <= SMALL_MODEL  # plain models do not tell
        can_divide = on_cpu and is_small and _native.why_missing("_C") is None
        return min(MAX_STREAMS, torch.get_num_threads()) if can_divide else 1
    if isinstance(streams, bool) or not isinstance(streams, int) or streams < 1:
        raise InputError(f"streams must be a positive int or None, got {streams!r}")
    if streams > 1 and not on_cpu:
        raise InputError(f"streams must be 1 for a model on {model.device}, which computes one batch after the other")
    if streams > 1 and _native.why_missing("_C"):
        raise InputError(f"streams must be 1 where threads cannot be divided: {_native.why_missing('_C')}")
    return streams


def run_batches(
    model: Perceiver,
    batches: Iterable[T],
    forward: Callable[[T], list[Tensor]],
    with_maps: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Decode the features `forward` returns for each batch.

    Returns the low-resolution head output (n, C, h, w) and, if asked for, one tensor of cross-attention maps (n, L, h',
    w') per level that has them; (output, []) otherwise.
    """
    outputs: list[Tensor] = []
    maps: dict[int, list[Tensor]] = {}
    for batch in batches:
        features = forward(batch)
        outputs.append(model.decode(features))
        if with_maps:
            for level, level_maps in model.split_maps(features)[1].items():
                maps.setdefault(level, []).append(level_maps.float())
    if with_maps and not maps:
        raise InputError(
            "with_maps=True needs a model with cross-attention maps; this one has none "
            f"(use_attn={model.config.use_attn}, attn_selector={model.config.attn_selector!r})"
        )
    return torch.cat(outputs), [torch.cat(maps[level]) for level in sorted(maps)]
