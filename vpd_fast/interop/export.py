"""Plain models for programs without this package: torch.export, ONNX and AOTInductor, for any number of images.

All take images of one size and return one tensor. Only the operators of PyTorch itself are in them, as the plain form
of attention has no other; what the exported program computes is what the model's `forward` does.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vpd_fast.errors import CheckpointError, InputError, MissingDependencyError, brief, described
from vpd_fast.files import as_path, write_files
from vpd_fast.models import VPD
from vpd_fast.models.attention_backends import PLAIN
from vpd_fast.models.checks import MAX_BATCH
from vpd_fast.tasks import TASKS

_SUFFIXES = {"export": ".pt2", "aoti": ".pt2", "onnx": ".onnx"}
FORMATS = tuple(_SUFFIXES)
_BATCH = 2  # of the traced inputs: torch.export takes sizes 0 and 1 for constants


class _Program(nn.Module):
    """A model whose result is one tensor: logits, or depth in metres."""

    def __init__(self, model: VPD) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, tokens: Tensor | None = None) -> Tensor:
        found = self.model(images) if tokens is None else self.model(images, tokens)
        return found["pred_d"] if isinstance(found, dict) else found


def export(model: VPD, size: int | tuple[int, int] | None = None) -> torch.export.ExportedProgram:
    """Return the program of a plain model, for any batch of images (B,3,H,W) of one size.

    size: of the images, (H, W) or one number for both; None: `config.base_size`. Inputs are those of `forward`: images,
    and of a referring model the tokens (B,T,context_dim) of a sentence for each; a depth model takes the mean over its
    scenes. The result is logits (B,classes,H,W), or depth (B,1,H,W) in metres. Raises InputError: a fast model, one in
    training, with another attention backend than "plain", or a size that it does not take.
    """
    if not isinstance(model, VPD):
        raise InputError(
            f"export: expected a plain model, got {type(model).__name__}; fast ones are kernels of this package alone, "
            "which save() keeps"
        )
    if model.training:
        raise InputError("export: the model is in training mode; call eval() first")
    if model.attention_backend != PLAIN:
        raise InputError(
            f"export: attention_backend={model.attention_backend!r} runs operators that need this package; set it to "
            f"{PLAIN!r}"
        )
    inputs = _inputs(model, size)
    batch = torch.export.Dim("batch", max=MAX_BATCH - 1)
    with torch.no_grad():
        _Program(model)(*inputs)  # a wrong size gives the model's own error
        return torch.export.export(_Program(model).eval(), inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))


def _inputs(model: VPD, size: int | tuple[int, int] | None) -> tuple[Tensor, ...]:
    config = model.config
    sides = config.base_size if size is None else size
    height, width = (sides, sides) if isinstance(sides, int) else sides if isinstance(sides, tuple) else (0, 0)
    if not all(type(side) is int and side > 0 for side in (height, width)):
        raise InputError(f"size must be a positive integer or (height, width), got {brief(size)}")
    place: dict[str, Any] = {"device": model.device, "dtype": model.dtype}
    images = torch.zeros(_BATCH, 3, height, width, **place)
    if not TASKS[config.task].takes_text:
        return (images,)
    return images, torch.zeros(_BATCH, config.tokens, config.backbone.context_dim, **place)


def save_export(model: VPD, path: str | Path, *, to: str = "export", size: int | tuple[int, int] | None = None) -> Path:
    """Write a plain model as a file that runs without this package; return its path.

    to: "export", a .pt2 file for `torch.export.load`; "onnx", for onnxruntime and others (large weights go into a file
    beside it, PATH.data); "aoti", a .pt2 file of machine code for this kind of machine, made by AOTInductor, which
    `torch._inductor.aoti_load_package` runs. size: as in `export`. Raises InputError, CheckpointError where the file
    cannot be written, MissingDependencyError without the ONNX packages or a C++ compiler; then nothing has changed.
    """
    if to not in _SUFFIXES:
        raise InputError(f"to must be one of {', '.join(FORMATS)}, got {brief(to)}")
    path = as_path(path, "path")
    if path.suffix != _SUFFIXES[to]:
        raise InputError(f"{path}: expected a name that ends in {_SUFFIXES[to]} for {to}")
    if to == "onnx":
        _require_onnx()
    program = export(model, size)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".vpd-fast-") as scratch:
            _WRITERS[to](program, Path(scratch) / path.name)
            made = sorted(Path(scratch).iterdir())
            write_files({path.parent / file.name: _moved(file) for file in made}, CheckpointError)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error})") from error
    return path


def _moved(file: Path) -> Callable[[Path], None]:
    return lambda temporary: os.replace(file, temporary)


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(f'ONNX needs `pip install "vpd_fast[onnx]"` ({error})') from error


def _write_export(program: torch.export.ExportedProgram, path: Path) -> None:
    torch.export.save(program, path)


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    made = torch.onnx.export(program, dynamo=True, verbose=False, output_names=["result"])
    assert made is not None  # with dynamo=True and without a file
    made.save(path)


def _write_aoti(program: torch.export.ExportedProgram, path: Path) -> None:
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    try:
        aoti_compile_and_package(program, package_path=str(path))
    except (InductorError, InvalidCxxCompiler, RuntimeError) as error:
        raise MissingDependencyError(
            f"AOTInductor could not compile the model; it needs a C++ compiler ({described(error)})"
        ) from error


_WRITERS = {"export": _write_export, "onnx": _write_onnx, "aoti": _write_aoti}
