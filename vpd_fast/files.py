"""Writing files so that nothing half-written is ever found under their names."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# The two files of a model's folder, named as transformers and diffusers name theirs.
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"

Writer = Callable[[Path], object]


def write_files(writers: Mapping[Path, Writer], error: type[Exception] | None = None) -> None:
    """Call every writer with a temporary name beside its file, then put all files in place.

    Folders are made. Whatever a writer raises is passed on, or becomes one `error` that names the first file; then the
    temporary files are removed and no existing file has changed. OSError where a file cannot be put in place, which is
    tried only when all are written.
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
    except Exception as cause:  # torch and safetensors report a full disk as errors of their own
        if error is None:
            raise
        raise error(f"{next(iter(writers))}: cannot be written ({cause})") from cause
    finally:
        for left in temporary.values():
            left.unlink(missing_ok=True)


def json_text(values: Mapping[str, Any]) -> str:
    """Return a JSON object as it is written to files."""
    return json.dumps(values, indent=2) + "\n"


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object under this very name; `write_files` makes that safe."""
    path.write_text(json_text(values), encoding="utf-8")
