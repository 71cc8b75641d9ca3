"""Writing files so that nothing half-written is ever found under their names."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path


def write_files(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Call every writer with a temporary name beside its file, then put all files in place.

    Folders are made. Whatever a writer raises is passed on; then the temporary files are removed and no existing file
    has changed. OSError where a file cannot be put in place, which is tried only when all are written.
    """
    temporary: dict[Path, Path] = {}
    try:
        for path, write in writers.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError(f"{path} is a folder, expected a file name")
            temporary[path] = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
            write(temporary[path])
        for path in writers:
            os.replace(temporary[path], path)
    finally:
        for left in temporary.values():
            left.unlink(missing_ok=True)
