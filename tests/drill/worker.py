"""Tries damaged files in a process of its own: `python -m tests.drill.worker FOLDER FIRST COUNT` prints a line of JSON
for each.

Each file is loaded, and run if its damage is not in the weights. FOLDER is made; what it has is used again.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import resource
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vpd_fast.errors import VPDFastError

from .formats import CASES, make, run
from .mutations import damaged_settings, damaged_text
from .peak import memory, reset_peak

# What docs/reliability.md promises: 5 s and 100 MB/s, 200 MB and the size. A picture's size is that of its pixels.
MAX_SECONDS, BYTES_PER_SECOND, MAX_BYTES = 5.0, 100e6, 200e6
BYTES_PER_PIXEL = 12
MAX_MESSAGE = 600
MAX_WALL = 120  # seconds, however busy the machine is: then the process ends
_PICTURES = (".png", ".jpg", ".webp", ".gif", ".bmp", ".tif", ".ppm", ".pgm", ".jp2")


def attempt(originals: Path, place: Path, number: int) -> dict[str, Any]:
    """Damage a file and load it; the same for the same number."""
    rng = random.Random(number)
    name, inner, damage, use = CASES[number % len(CASES)]
    path = place / name
    for left in place.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    if (originals / name).is_dir():
        shutil.copytree(originals / name, path)
    else:
        shutil.copy(originals / name, path)
    target = path / inner if inner else path
    data = target.read_bytes()
    if damage in (damaged_settings, damaged_text):
        target.write_bytes(damage(rng, data.decode()).encode("utf-8", "surrogateescape"))
    else:
        target.write_bytes(damage(rng, data))
    size = sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
    size += BYTES_PER_PIXEL * pixels(path)
    found = tried(path, use)
    if found["seconds"] > MAX_SECONDS + size / BYTES_PER_SECOND:
        found["problem"] = f"{found['seconds']:.1f} s"
    if found["bytes"] > MAX_BYTES + size:
        found["problem"] = f"{found['bytes'] / 1e6:.0f} MB of memory"
    return {"number": number, "case": f"{name} {inner} {damage.__name__} {use.__name__}", **found}


def tried(path: Path, use: Any) -> dict[str, Any]:
    """Use a file, and return what came of it, how long it took and how much memory."""
    reset_peak()
    before, start = memory("VmRSS"), time.process_time()
    problem = None
    faulthandler.dump_traceback_later(MAX_WALL, exit=True)
    try:
        output = use(path)
        outcome = "accepted"
        if isinstance(output, torch.Tensor) and not bool(torch.isfinite(output).all()):
            problem = "its output is not finite"
    except VPDFastError as error:
        outcome = "refused"
        if len(str(error)) > MAX_MESSAGE:
            problem = f"a message of {len(str(error))} characters"
        if "\n" in str(error):
            problem = "a message of several lines"
    except BaseException as error:
        outcome, problem = "failed", f"{type(error).__name__}: {str(error)[:200]}"
    faulthandler.cancel_dump_traceback_later()
    seconds, grown = time.process_time() - start, memory("VmHWM") - before
    return {"outcome": outcome, "problem": problem, "seconds": round(seconds, 2), "bytes": grown}


def pixels(path: Path) -> int:
    """Return how many pixels a picture says that it has."""
    if path.suffix not in _PICTURES:
        return 0
    try:
        with Image.open(path) as image:
            return image.width * image.height
    except Exception:
        return 0


def main(folder: Path, first: int, count: int) -> None:
    """Make whole files, use each once (what is loaded for the first time is not counted as a file's), and try."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of Pillow, by the thousand
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    whole, place = folder / "whole", folder / f"place-{os.getpid()}"
    place.mkdir(parents=True)
    if not whole.exists():
        partial = folder / f"partial-{os.getpid()}"
        partial.mkdir()
        make(partial)
        partial.rename(whole)
    run(whole / "own")
    for name, use in dict.fromkeys((name, use) for name, _, _, use in CASES):
        copy = place / name
        shutil.copytree(whole / name, copy) if (whole / name).is_dir() else shutil.copy(whole / name, copy)
        use(copy)
        shutil.rmtree(copy) if copy.is_dir() else copy.unlink()
    for number in range(first, first + count):
        print(json.dumps({"number": number}), flush=True)  # the last word, should the process end
        print(json.dumps(attempt(whole, place, number)), flush=True)
    shutil.rmtree(place)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
