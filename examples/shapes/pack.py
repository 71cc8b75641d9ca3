"""Makes the weights that come with the package out of what pretrain.py and finetune.py left.

    python examples/shapes/pack.py --data shapes-data --weights shapes-sd --runs shapes-runs

Writes vpd_fast/assets/shapes-*.safetensors (8-bit weights) and vpd_fast/assets/shapes-text. Each file's metadata say
how it was made (commands, settings of both trainings) and what it reaches on held-out scenes, before and after
rounding. The pre-trained weights themselves go to pretrained.safetensors beside this script, which unpack.py reads.
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

import torch
from finetune import SPLITS, measure
from safetensors.torch import load_file, save_file
from script import MAKE_WEIGHTS, require, run_script

from vpd_fast import VPD, __version__, bundled
from vpd_fast.checkpoints import reader
from vpd_fast.checkpoints.infer import ENCODER
from vpd_fast.checkpoints.save import write_bundled
from vpd_fast.config import TASKS
from vpd_fast.errors import CheckpointError
from vpd_fast.files import write_files
from vpd_fast.training.config import load_config

# Steps of `bundled.pack` make a wheel smaller and cost, on test scenes and unseen ones: segmentation, which needs a
# finer one, mIoU 0.8527 -> 0.8521 and 0.8048 -> 0.8035; referring oIoU 0.7463 -> 0.7459, P@0.5 up to 0.7 points; depth
# rmse 0.3178 -> 0.3205 and 0.3175 -> 0.3204, a tenth of what two trainings differ by, abs_rel 0.0319 -> 0.0332. The KL
# encoder, which all share, and the text encoder keep all 8 bits.
STEPS = {"segmentation": 0.065, "referring": 0.12, "depth": 0.25}
PRETRAINED = Path(__file__).parent / "pretrained.safetensors"


def pack_text(weights: Path, folder: Path) -> None:
    """The text encoder with 8-bit weights, and its tokenizer."""
    kept = [path for name in ("text_encoder", "tokenizer") for path in (weights / name).iterdir()]
    writers = {folder / path.parent.name / path.name: copy_of(path) for path in kept if path.suffix != ".safetensors"}
    prefix = "text_model."  # which newer releases of transformers leave out and all of them read
    tensors = load_file(weights / "text_encoder" / "model.safetensors")
    packed = bundled.pack({prefix + name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    target = folder / "text_encoder" / "model.safetensors"
    write_files({**writers, target: lambda temporary: save_file(packed, temporary, metadata={"format": "pt"})})


def pack_pretrained(weights: Path, target: Path) -> None:
    """Autoencoder and UNet with 8-bit weights."""
    packed = bundled.pack(load_file(weights / "sd.safetensors"))
    metadata = {"format": "pt", bundled.RECORD: (weights / "report.json").read_text(encoding="utf-8")}
    write_files({target: lambda temporary: save_file(packed, temporary, metadata=metadata)})


def copy_of(source: Path) -> Callable[[Path], Any]:
    """A writer, as `write_files` takes it."""
    return lambda temporary: shutil.copyfile(source, temporary)


def pack_task(task: str, data: Path, weights: Path, runs: Path, folder: Path) -> dict[str, Any]:
    """One model's file into `folder`, which has the text encoder; its record. Raises CheckpointError."""
    run = runs / task
    model = VPD.from_pretrained(run / "best")
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_encoder(model, weights)
    record = {
        "commands": [
            f"python examples/shapes/{name}" for name in ("pretrain.py", f"finetune.py --tasks {task}", "pack.py")
        ],
        "vpd_fast": __version__,
        "pretraining": reader.read_json(weights / "report.json"),
        "finetuning": settings_of(run),
        "float32": reader.read_json(run / "test.json"),
    }
    root = model.config.key_prefix + ENCODER
    shared, others = map(bundled.unpack, bundled.pack_model(tensors, root, STEPS[task]))
    model.load_state_dict(others | {root + key: tensor for key, tensor in shared.items()})
    text = folder / bundled.TEXT_ENCODER
    record["8-bit weights"] = {split: measure(model, data, text, split) for split in SPLITS}
    config = model.config.replace(text_encoder=bundled.TEXT_ENCODER)
    write_bundled(folder, f"shapes-{task}", tensors, config, record, STEPS[task])
    return record


def settings_of(run: Path) -> dict[str, Any]:
    """The configuration of a training, without the places of its files."""
    settings = load_config(run / "config.yaml").to_dict()
    for section, name in (
        ("data", "root"), ("init", "stable_diffusion"), ("init", "text_encoder"), ("encoder", "cache"),
    ):  # fmt: skip
        del settings[section][name]
    return settings


def check_encoder(model: VPD, weights: Path) -> None:
    """Raise CheckpointError where a model was not fine-tuned from `weights`."""
    path = weights / "sd.safetensors"
    pretrained = reader.read_file(path).tensors
    for name, tensor in model.backbone.encoder_vq.state_dict().items():
        if not torch.equal(tensor, pretrained[f"first_stage_model.{name}"]):
            raise CheckpointError(f"the {model.config.task} model was not fine-tuned from {path}; run finetune.py anew")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("shapes-data"))
    parser.add_argument("--weights", type=Path, default=Path("shapes-sd"))
    parser.add_argument("--runs", type=Path, default=Path("shapes-runs"))
    parser.add_argument("--output", type=Path, default=bundled.ASSETS)
    parser.add_argument("--pretrained", type=Path, default=PRETRAINED, help="where the pre-trained weights go")
    options = parser.parse_args()
    require(options.weights / "sd.safetensors", MAKE_WEIGHTS)
    for task in TASKS:
        require(options.runs / task / "test.json", f"python examples/shapes/finetune.py --output {options.runs}")
    # A whole new set or none: the files of one set belong together.
    with tempfile.TemporaryDirectory() as scratch:
        new = Path(scratch)
        pack_text(options.weights, new / bundled.TEXT_ENCODER)
        for task in TASKS:
            record = pack_task(task, options.data, options.weights, options.runs, new)
            print(f"{task}: {json.dumps({name: record[name] for name in ('float32', '8-bit weights')})}")
        files = [path for path in new.rglob("*") if path.is_file()]
        pack_pretrained(options.weights, options.pretrained)
        write_files({options.output / path.relative_to(new): copy_of(path) for path in files})
        print(f"{options.output}: {sum(path.stat().st_size for path in files) / 1e6:.2f} MB")


if __name__ == "__main__":
    sys.exit(run_script(main))
