"""The errors vpd_fast raises on purpose. Each message names what was wrong, what came and what was expected."""

from __future__ import annotations

import reprlib
from typing import Any

MAX_SHOWN = 120  # characters of a value in a message
MAX_REASON = 300  # characters of another library's error in a message


class VPDFastError(Exception):
    """Base of every deliberate error; the command line prints it as one line and exits with code 2."""


class InputError(VPDFastError, ValueError):
    """An argument has the wrong shape, dtype, device, range or name."""


class CheckpointError(VPDFastError, ValueError):
    """A checkpoint is unreadable, hostile, incomplete or of another task."""


class ImageError(VPDFastError, ValueError):
    """An image cannot be read, is empty, cannot be written, or what a model makes of it is not finite."""


class TruncationWarning(UserWarning):
    """A text has more tokens than a model takes, and its last words have no effect."""


class DatasetError(VPDFastError, ValueError):
    """A data set's folder or file is missing, misnamed, broken, or does not fit the others."""


class MissingDependencyError(VPDFastError, ImportError):
    """An optional package, a native module or a pretrained model is not available."""


class TrainingError(VPDFastError, RuntimeError):
    """Training cannot go on: the loss or gradients are not finite, step after step, or a step failed."""


class ModelError(VPDFastError, RuntimeError):
    """A model, or the GPU under it, failed while it computed; its own error is the cause."""


class _Brief(reprlib.Repr):
    """Shows a few items of each container, and containers in containers only once."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxtuple = self.maxlist = self.maxdict = self.maxset = 4
        self.maxstring = self.maxother = self.maxlong = MAX_SHOWN

    def repr_bytes(self, x: bytes, level: int) -> str:
        return repr(bytes(x[:MAX_SHOWN]))

    repr_bytearray = repr_bytes

    def repr_Tensor(self, x: Any, level: int) -> str:
        return f"Tensor{tuple(x.shape)}"


def described(error: BaseException) -> str:
    """Return type and text of an error of others, in one line that fits into a message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= MAX_REASON else f'{text[: MAX_REASON - 3]}...'}"


def brief(value: object) -> str:
    """Return `repr` of a value that came from outside, cut to what fits into a message, however large it is."""
    try:
        text = _Brief().repr(value)
    except Exception:  # an int of more digits than Python prints, a class whose repr fails
        text = f"<{type(value).__name__}>"
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."
