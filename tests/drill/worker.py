"""Tries damaged files in a process of its own: `worker.py FOLDER FIRST COUNT` prints a line of JSON for each.

It needs only vpd_fast and the modules beside it. Each file is loaded, and run if its damage is not in the weights.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(__file__))

import torch
from mutations import damaged, damaged_archive, damaged_settings
from safetensors.torch import save_file

import vpd_fast
from vpd_fast import VPD, BackboneConfig, VPDConfig
from vpd_fast.checkpoints import convert, load_checkpoint, open_checkpoint
from vpd_fast.errors import VPDFastError
from vpd_fast.models.random_weights import randomize

MAX_SECONDS, MAX_BYTES, MAX_MESSAGE = 5.0, 200 * 2**20, 600
SMALL = BackboneConfig(
    model_channels=32, context_dim=32, num_heads=4, num_res_blocks=1, channel_mult=(1, 1, 1, 1), vae_ch=32,
    vae_ch_mult=(1, 1, 1, 1), vae_num_res_blocks=1,
)  # fmt: skip
CONFIG = VPDConfig(num_classes=2, base_size=128, channels=32, class_names=("a", "b"), backbone=SMALL)


def make(folder: Path) -> None:
    """Write a whole file or folder of each kind."""
    torch.manual_seed(0)
    model = randomize(VPD.empty(CONFIG), 0).eval()
    content = {"state_dict": model.state_dict(), "meta": {"CLASSES": ("a", "b")}, "optimizer": {"state": {0: [1.5]}}}
    torch.save(content, folder / "zip.pth")
    torch.save(content, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(model.state_dict(), folder / "plain.safetensors")
    model.save_pretrained(folder / "own")
    convert(folder / "own", folder / "diffusers", to="diffusers")
    vpd_fast.optimize(model, "int8").save(folder / "engine")


def run(path: Path) -> Any:
    """Load a model or an engine and run it."""
    model = vpd_fast.load_engine(path) if (path / "engine.json").exists() else load_checkpoint(path)
    with torch.inference_mode():
        return model(torch.full((1, 3, 128, 128), 0.5))


def load(path: Path) -> None:
    """Load a model without running it: its weights may be any numbers."""
    if path.name == "diffusers":
        open_checkpoint(path, mmap=False)
    elif (path / "engine.json").exists():
        vpd_fast.load_engine(path, mmap=False)
    else:
        load_checkpoint(path, num_heads=4, base_size=128)


# (what is copied, the file in it that is damaged, how, what is done with it)
Case = tuple[str, str, Callable[[random.Random, Any], Any], Callable[[Path], Any]]
CASES: tuple[Case, ...] = (
    ("zip.pth", "", damaged, load),
    ("zip.pth", "", damaged_archive, load),
    ("legacy.pth", "", damaged, load),
    ("plain.safetensors", "", damaged, load),
    ("own", "model.safetensors", damaged, load),
    ("own", "config.json", damaged_settings, run),
    ("diffusers", "unet/config.json", damaged_settings, load),
    ("diffusers", "unet/diffusion_pytorch_model.safetensors", damaged, load),
    ("engine", "engine.json", damaged_settings, run),
    ("engine", "engine.safetensors", damaged, load),
)


def attempt(originals: Path, place: Path, number: int) -> dict[str, Any]:
    """Damage a file and load it; the same for the same number."""
    rng = random.Random(number)
    name, inner, damage, use = CASES[number % len(CASES)]
    path = place / name
    for left in place.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    if inner:
        shutil.copytree(originals / name, path)
    else:
        shutil.copy(originals / name, path)
    target = path / inner if inner else path
    data = target.read_bytes()
    if damage is damaged_settings:
        target.write_bytes(damage(rng, data.decode()).encode("utf-8", "surrogateescape"))
    else:
        target.write_bytes(damage(rng, data))
    size = sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
    before, start = peak(), time.process_time()
    problem = None
    signal.alarm(60)
    try:
        output = use(path)
        outcome = "accepted"
        if output is not None and not bool(torch.isfinite(output).all()):
            problem = "its output is not finite"
    except VPDFastError as error:
        outcome = "refused"
        if len(str(error)) > MAX_MESSAGE:
            problem = f"a message of {len(str(error))} characters"
    except BaseException as error:
        outcome, problem = "failed", f"{type(error).__name__}: {str(error)[:200]}"
    signal.alarm(0)
    seconds, grown = time.process_time() - start, peak() - before
    if seconds > MAX_SECONDS + size / 1e8:
        problem = f"{seconds:.1f} s"
    if grown > MAX_BYTES + size:
        problem = f"{grown / 2**20:.0f} MiB of memory"
    return {"number": number, "case": f"{name} {inner} {damage.__name__}", "outcome": outcome, "problem": problem}


def peak() -> int:
    """Return the most bytes that the process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def stop(*_: Any) -> None:
    raise TimeoutError("no end in a minute")


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    folder, first, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    (folder / "place").mkdir()
    (folder / "whole").mkdir()
    make(folder / "whole")
    for kind in ("own", "engine"):  # what is loaded for the first time is not counted as a file's
        run(folder / "whole" / kind)
    for number in range(first, first + count):
        print(json.dumps({"number": number}), flush=True)  # the last word, should the process end
        print(json.dumps(attempt(folder / "whole", folder / "place", number)), flush=True)
