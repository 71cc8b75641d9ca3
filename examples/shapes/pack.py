"""Makes the weights that come with the package out of what pretrain.py and finetune.py left.

    python examples/shapes/pack.py --data shapes-data --weights shapes-sd --runs shapes-runs

Writes vpd_fast/assets/shapes-*.safetensors (8-bit weights) and vpd_fast/assets/shapes-text. Each file's metadata say
how it was made and what it reaches on held-out scenes, before and after rounding.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune import SPLITS, measure
from safetensors.torch import load_file, save_file

from vpd_fast import VPD, __version__
from vpd_fast.checkpoints import bundled, reader
from vpd_fast.config import TASKS
from vpd_fast.errors import VPDFastError
from vpd_fast.files import write_files


def pack_text(weights: Path, folder: Path) -> None:
    """The text encoder with 8-bit weights, and its tokenizer."""
    kept = [path for name in ("text_encoder", "tokenizer") for path in (weights / name).iterdir()]
    writers = {folder / path.parent.name / path.name: _copy_of(path) for path in kept if path.suffix != ".safetensors"}
    packed = bundled.pack(load_file(weights / "text_encoder" / "model.safetensors"))
    target = folder / "text_encoder" / "model.safetensors"
    write_files({**writers, target: lambda temporary: save_file(packed, temporary, metadata={"format": "pt"})})


def _copy_of(source: Path) -> Callable[[Path], Any]:
    return lambda temporary: shutil.copyfile(source, temporary)


def pack_task(task: str, data: Path, weights: Path, runs: Path, folder: Path) -> dict[str, Any]:
    """One model's file into `folder`; its record."""
    run = runs / task
    model = VPD.from_pretrained(run / "best")
    record = {
        "made by": "examples/shapes/make.sh", "vpd_fast": __version__,
        "pretraining": reader.read_json(weights / "report.json"),
        "float32": reader.read_json(run / "test.json"),
    }  # fmt: skip
    config = model.config.replace(text_encoder=bundled.TEXT_ENCODER)
    model.load_state_dict(bundled.unpack(bundled.pack(model.state_dict())))
    record["8-bit weights"] = {split: measure(model, data, weights, split) for split in SPLITS}
    bundled.write_bundled(folder, f"shapes-{task}", VPD.from_pretrained(run / "best").state_dict(), config, record)
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("shapes-data"))
    parser.add_argument("--weights", type=Path, default=Path("shapes-sd"))
    parser.add_argument("--runs", type=Path, default=Path("shapes-runs"))
    parser.add_argument("--output", type=Path, default=bundled.ASSETS)
    options = parser.parse_args()
    try:
        # A whole new set or none: the files of one set belong together.
        with tempfile.TemporaryDirectory() as scratch:
            new = Path(scratch)
            pack_text(options.weights, new / bundled.TEXT_ENCODER)
            for task in TASKS:
                record = pack_task(task, options.data, options.weights, options.runs, new)
                print(f"{task}: {json.dumps({name: record[name] for name in ('float32', '8-bit weights')})}")
            files = [path for path in new.rglob("*") if path.is_file()]
            write_files({options.output / path.relative_to(new): _copy_of(path) for path in files})
            print(f"{options.output}: {sum(path.stat().st_size for path in files) / 1e6:.2f} MB")
    except (VPDFastError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
