"""A whole file of each kind that the package reads, what is done with it, and how it is damaged."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import vpd_fast
from vpd_fast import VPD, BackboneConfig, VPDConfig
from vpd_fast.bundled import TEXT_ENCODER, asset
from vpd_fast.checkpoints import convert, load_checkpoint, open_checkpoint, verify
from vpd_fast.data import open_dataset
from vpd_fast.data.sample import load_sample
from vpd_fast.errors import VPDFastError
from vpd_fast.inference.listing import Listing, Shard
from vpd_fast.inference.records import Records
from vpd_fast.models.random_weights import randomize
from vpd_fast.models.text import TextEncoder
from vpd_fast.pictures.masks import read_mask
from vpd_fast.pictures.reading import read_image
from vpd_fast.training.checkpoint import random_state, read_state, write_state
from vpd_fast.training.config import TrainConfig, load_config

from ..helpers import miniature
from .mutations import damaged, damaged_archive, damaged_settings, damaged_text

SMALL = BackboneConfig(
    model_channels=32, context_dim=32, num_heads=4, num_res_blocks=1, channel_mult=(1, 1, 1, 1), vae_ch=32,
    vae_ch_mult=(1, 1, 1, 1), vae_num_res_blocks=1,
)  # fmt: skip
CONFIG = VPDConfig(num_classes=2, base_size=128, channels=32, class_names=("a", "b"), backbone=SMALL)
HEADER = {"task": "segmentation", "options": {"flip": True}}
IMAGES = ("jpg", "png", "webp", "gif", "bmp", "tif", "ppm", "jp2")
MASKS = {"8.png": "L", "1.png": "1", "palette.png": "P", "16.png": "I;16", "mask.tif": "L", "mask.pgm": "L"}
DATASETS = {"refcoco": "train", "folder": "train"}
_WEIGHTS = "diffusion_pytorch_model.safetensors"


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
    _shards(folder)
    vpd_fast.optimize(model, "int8").save(folder / "engine")
    (folder / "training").mkdir()
    config = TrainConfig.from_dict({"task": "depth"})
    state = {"step": 3, "random": [random_state()], "optimizer": {"state": {0: {"step": torch.ones(())}}}}
    write_state(folder / "training" / "training.pt", {**state, "config": config.to_dict()})
    config.save(folder / "run.yaml")
    _pictures(folder)
    _records(folder / "records")
    _text_encoder(folder / "text")
    miniature.refer(folder / "refcoco")
    miniature.folder(folder / "folder", "referring")
    (folder / "images.txt").write_text("".join(f"{folder / 'image'}.{ending}\n" for ending in IMAGES))


def _shards(folder: Path) -> None:
    convert(folder / "own", folder / "shards", to="diffusers")
    unet = folder / "shards" / "unet"
    tensors = load_file(unet / _WEIGHTS)
    names = {key: f"part-{i % 2}.safetensors" for i, key in enumerate(tensors)}
    for name in set(names.values()):
        save_file({key: tensors[key] for key in tensors if names[key] == name}, unet / name)
    (unet / f"{_WEIGHTS}.index.json").write_text(json.dumps({"weight_map": names}))
    (unet / _WEIGHTS).unlink()


def _pictures(folder: Path) -> None:
    pixels, labels, _ = miniature.picture(0)
    for ending in IMAGES:
        Image.fromarray(pixels).save(folder / f"image.{ending}")
    for name, mode in MASKS.items():
        if mode == "I;16":
            mask = Image.fromarray(labels.astype(np.uint16) * 1000)
        elif mode == "P":
            mask = Image.fromarray(labels).convert("P")
            mask.putpalette(list(range(256)) * 3)
        else:
            mask = Image.fromarray(labels * 50).convert(mode)
        mask.save(folder / name)


def _records(folder: Path) -> None:
    folder.mkdir()
    with Records(folder, Shard(), HEADER) as records:
        for i in range(20):
            more: dict[str, Any] = {"error": "broken"} if i % 7 == 3 else {"files": [], "seconds": 0.1}
            records.add({"image": f"sub/{i}.png", **more})


def _text_encoder(folder: Path) -> None:
    for path in asset(TEXT_ENCODER).rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(asset(TEXT_ENCODER))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())


def run(path: Path) -> Any:
    """Load a model or an engine and run it."""
    model = vpd_fast.load_engine(path) if (path / "engine.json").exists() else load_checkpoint(path)
    with torch.inference_mode():
        return model(torch.full((1, 3, 128, 128), 0.5))


def load(path: Path) -> None:
    """Load a model without running it: its weights may be any numbers."""
    if (path / "unet").is_dir():
        open_checkpoint(path, mmap=False)
    elif (path / "engine.json").exists():
        vpd_fast.load_engine(path, mmap=False)
    else:
        load_checkpoint(path, num_heads=4, base_size=128)


def check(path: Path) -> None:
    """Compare a folder with its check sums."""
    verify(path)


def resume(path: Path) -> None:
    """Go on with a run of prediction."""
    with Records(path, Shard(), HEADER, resume=True) as records:
        records.add({"image": "new.png", "files": []})


def embed(path: Path) -> Any:
    """Embed a sentence."""
    return TextEncoder(path, remember=False, cache_dir=path / "cache").embed_sentences(["the red cube"], tokens=8)


def samples(path: Path) -> None:
    """Read all samples of a data set; those that cannot be read are errors of their own."""
    options = {"task": "referring"} if path.name == "folder" else {}
    dataset = open_dataset(path.name, path, DATASETS[path.name], **options)
    found = [load_sample(dataset, i) for i in range(len(dataset))]
    if all(isinstance(sample, VPDFastError) for sample in found):
        raise found[0]


def listed(path: Path) -> None:
    """Read a list of images' names."""
    list(Listing([], str(path), False, path.parent, True).paths())


Damage = Callable[[random.Random, Any], Any]
# (what is copied, the file in it that is damaged, how, what is done with it)
Case = tuple[str, str, Damage, Callable[[Path], Any]]
MODELS: tuple[Case, ...] = (
    ("zip.pth", "", damaged, load),
    ("zip.pth", "", damaged_archive, load),
    ("legacy.pth", "", damaged, load),
    ("plain.safetensors", "", damaged, load),
    ("own", "model.safetensors", damaged, load),
    ("own", "config.json", damaged_settings, run),
    ("diffusers", "unet/config.json", damaged_settings, load),
    ("diffusers", f"unet/{_WEIGHTS}", damaged, load),
    ("engine", "engine.json", damaged_settings, run),
    ("engine", "engine.safetensors", damaged, load),
)
OTHERS: tuple[Case, ...] = (
    ("own", "model.safetensors", damaged, check),
    ("engine", "engine.json", damaged_settings, check),
    ("shards", f"unet/{_WEIGHTS}.index.json", damaged_settings, load),
    ("training", "training.pt", damaged, read_state),
    ("training", "training.pt", damaged_archive, read_state),
    ("run.yaml", "", damaged_text, load_config),
    *((f"image.{ending}", "", damaged, read_image) for ending in IMAGES),
    *((name, "", damaged, read_mask) for name in MASKS),
    ("records", "results.jsonl", damaged, resume),
    ("text", "tokenizer/vocab.json", damaged_settings, embed),
    ("text", "tokenizer/merges.txt", damaged_text, embed),
    ("text", "tokenizer/tokenizer_config.json", damaged_settings, embed),
    ("text", "text_encoder/config.json", damaged_settings, embed),
    ("text", "text_encoder/model.safetensors", damaged, embed),
    ("refcoco", "refcoco/refs(unc).p", damaged, samples),
    ("refcoco", "refcoco/instances.json", damaged_settings, samples),
    ("folder", "sentences.json", damaged_settings, samples),
    ("images.txt", "", damaged_text, listed),
)
CASES = MODELS * 3 + OTHERS  # what comes from elsewhere, and is large, most often
