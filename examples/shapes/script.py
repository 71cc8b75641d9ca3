"""How the scripts end: one line for errors, what to do after an interruption."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from vpd_fast.config import TASKS
from vpd_fast.errors import CheckpointError, VPDFastError
from vpd_fast.training.build import choose_precision

MAKE_WEIGHTS = "python examples/shapes/pretrain.py (an hour) or python examples/shapes/unpack.py (at once)"


def run_script(main: Callable[[], None]) -> int:
    """Exit code: 0 done, 2 an error on one line, 130 stopped."""
    try:
        main()
    except (VPDFastError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def autocast() -> torch.autocast:
    """bfloat16 where this CPU has arithmetic for it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=choose_precision("auto", torch.device("cpu")) == "bf16")


def require(path: Path, command: str) -> None:
    """Raise CheckpointError where a file is missing that `command` makes."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; it is made by: {command}")


def task_names(text: str) -> list[str]:
    """Tasks separated by commas, for argparse."""
    names = text.split(",")
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: tasks are {', '.join(TASKS)}")
    return names


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)
