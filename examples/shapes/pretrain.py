"""Trains a miniature Stable Diffusion on the shapes world, from nothing: autoencoder, text encoder, denoiser.

    python examples/shapes/pretrain.py --data shapes-data --output shapes-sd

Made for two CPU cores and an hour. It may be stopped at any time; the same command goes on. What it leaves in --output:
sd.safetensors (Stable Diffusion's key names, for VPD.from_stable_diffusion), text_encoder/ and tokenizer/ (for
vpd_fast.models.text.TextEncoder), reconstructions.png, samples.png (drawn from noise and a caption) and report.json.
As in latent diffusion (Rombach et al. 2022, section 3.3) the text encoder is trained together with the denoiser.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from models import BACKBONE, SIZE, TOKENS, Autoencoder, Denoiser, make_text_encoder
from PIL import Image
from safetensors.torch import save_file
from sampling import add_noise, ddim, guided
from script import autocast, positive, run_script
from stages import train
from torch import Tensor, nn
from tqdm import tqdm
from words import END, START, known_words, training_text, write_tokenizer

from vpd_fast.data.shapes import Scene, ShapesDataset
from vpd_fast.files import write_files

KL_WEIGHT = 5e-4
GUIDANCE = 2.5


def render_scenes(root: Path, split: str, count: int) -> list[Scene]:
    """The first scenes of a split, drawn by all cores where `root` does not have them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with (
        ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn"), initializer=_one_thread) as pool,
        tqdm(total=count, desc=f"scenes ({split})", unit="scene") as bar,
    ):
        scenes = []
        for scene in pool.map(functools.partial(_scene, root, split), range(count), chunksize=25):
            scenes.append(scene)
            bar.update()
    return scenes


def _one_thread() -> None:
    torch.set_num_threads(1)


def _scene(root: Path, split: str, index: int) -> Scene:
    """Without labels, depth and instances, which pre-training does not look at."""
    scene = ShapesDataset(root, split, task="depth", length=index + 1, size=SIZE).scene(index)
    nothing = np.empty(0)
    return dataclasses.replace(scene, labels=nothing, depth=nothing, instances=nothing)


def pixels(scenes: list[Scene]) -> Tensor:
    """(N,3,128,128) uint8."""
    return torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2).contiguous()


def batch_of(images: Tensor, step: int, size: int, seed: int) -> tuple[Tensor, Tensor, torch.Generator]:
    """Indices (B,) and whether each is mirrored (B,), drawn from step and seed."""
    generator = torch.Generator().manual_seed(seed * 10**7 + step)
    return (
        torch.randint(len(images), (size,), generator=generator),
        torch.rand(size, generator=generator) < 0.5,
        generator,
    )


def to_float(images: Tensor, mirror: Tensor | None = None) -> Tensor:
    """uint8 -> float32 in [-1,1]; those marked seen in a mirror."""
    images = images.float() / 127.5 - 1
    return images if mirror is None else torch.where(mirror[:, None, None, None], images.flip(3), images)


# Autoencoder


def autoencoder_loss(model: Autoencoder, images: Tensor, batch: int, seed: int, step: int) -> Tensor:
    """Absolute error of pixels and of their differences (edges count twice), and the KL term."""
    index, mirror, generator = batch_of(images, step, batch, seed)
    x = to_float(images[index], mirror)
    with autocast():
        mean, log_variance = model.moments(x)
        noise = torch.randn(mean.shape, generator=generator)
        error = model.decode(mean + (0.5 * log_variance).exp() * noise).float() - x
    mean, log_variance = mean.float(), log_variance.float()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return error.abs().mean() + 0.5 * edges + KL_WEIGHT * kl


@torch.no_grad()
def latents_of(model: Autoencoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """Means and deviations of the latents (2,N,C,16,16), float16: of the images, and of them seen in a mirror."""
    means, deviations = [], []
    for flipped in (False, True):
        parts = []
        for start in tqdm(range(0, len(images), 100), desc="latents", unit="batch"):
            x = to_float(images[start : start + 100])
            with autocast():
                parts.append([m.half() for m in model.moments(x.flip(3) if flipped else x)])
        means.append(torch.cat([mean for mean, _ in parts]))
        deviations.append(torch.cat([(0.5 * log_variance.float()).exp().half() for _, log_variance in parts]))
    return torch.stack(means), torch.stack(deviations)


@torch.no_grad()
def reconstruction_error(model: Autoencoder, images: Tensor) -> float:
    """Mean peak signal-to-noise ratio in decibels."""
    x = to_float(images)
    error = (model.decode(model.encode(x)).clamp(-1, 1) - x).square().flatten(1).mean(1)
    return float((10 * torch.log10(4 / error)).mean())


# Diffusion


class TextToImage(nn.Module):
    """Text encoder and denoiser, which train together."""

    def __init__(self, vocabulary: dict[str, int]) -> None:
        super().__init__()
        self.text = make_text_encoder(vocabulary, START, END)
        self.denoiser = Denoiser()

    def context(self, ids: Tensor) -> Tensor:
        """Token ids (B,TOKENS) -> features (B,TOKENS,context_dim)."""
        return self.text(input_ids=ids).last_hidden_state


def diffusion_loss(
    model: TextToImage, tokenizer: Any, scenes: list[Scene], latents: tuple[Tensor, Tensor], batch: int, seed: int,
    step: int,
) -> Tensor:  # fmt: skip
    """Mean squared error of the noise."""
    means, deviations = latents
    index, mirror, generator = batch_of(means[0], step, batch, seed)
    random = np.random.default_rng((seed, step))
    texts = [training_text(scenes[i], bool(m), random) for i, m in zip(index.tolist(), mirror, strict=True)]
    mean, deviation = (t[mirror.long(), index].float() for t in (means, deviations))
    x = mean + deviation * torch.randn(mean.shape, generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    timesteps = torch.randint(1000, (batch,), generator=generator)
    with autocast():
        context = model.context(token_ids(tokenizer, texts))
        predicted = model.denoiser(add_noise(x, noise, timesteps), timesteps, context)
    return F.mse_loss(predicted.float(), noise)


def token_ids(tokenizer: Any, texts: list[str]) -> Tensor:
    """Ids (n,TOKENS), as `vpd_fast.models.text.TextEncoder` makes them."""
    return tokenizer(texts, truncation=True, max_length=TOKENS, padding="max_length", return_tensors="pt")["input_ids"]


@torch.no_grad()
def draw_samples(
    model: TextToImage, autoencoder: Autoencoder, tokenizer: Any, captions: list[str], seed: int
) -> Tensor:
    """Images (n,3,128,128) in [-1,1] from noise and captions."""
    shape = (len(captions), BACKBONE.in_channels, SIZE // 8, SIZE // 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    with autocast():
        context, empty = model.context(token_ids(tokenizer, captions)), model.context(token_ids(tokenizer, [""]))[0]
        latents = ddim(guided(model.denoiser, context, empty, GUIDANCE), noise)
        return autoencoder.decode(latents).float().clamp(-1, 1)


def save_sheet(path: Path, rows: list[Tensor], captions: list[str] | None = None) -> None:
    """Rows of images (n,3,h,w) in [-1,1] as one PNG; captions go into a text file beside it."""
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    picture = Image.fromarray(((sheet + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
    writers: dict[Path, Any] = {path: lambda temporary: picture.save(temporary, format="PNG")}
    if captions:
        text = "".join(f"{caption}\n" for caption in captions)
        writers[path.with_suffix(".txt")] = lambda temporary: temporary.write_text(text, encoding="utf-8")
    write_files(writers)


def save_model(folder: Path, autoencoder: Autoencoder, model: TextToImage, report: dict[str, Any]) -> None:
    """sd.safetensors, text_encoder/ and report.json."""
    tensors = {f"first_stage_model.{name}": tensor for name, tensor in autoencoder.state_dict().items()}
    tensors |= {f"model.diffusion_model.{name}": tensor for name, tensor in model.denoiser.state_dict().items()}
    writers: dict[Path, Any] = {
        folder / "sd.safetensors": lambda path: save_file(tensors, path),
        folder / "report.json": lambda path: path.write_text(json.dumps(report, indent=2) + "\n"),
    }
    with tempfile.TemporaryDirectory() as scratch:
        model.text.save_pretrained(scratch)
        for saved in Path(scratch).iterdir():
            content = saved.read_bytes()
            target = folder / "text_encoder" / saved.name
            writers[target] = lambda path, content=content: path.write_bytes(content)
    write_files(writers)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, or what is left of it."""
    from transformers import CLIPTokenizer

    folder: Path = options.output
    torch.manual_seed(options.seed)
    scenes = render_scenes(options.data, "train", options.scenes)
    held_out = render_scenes(options.data, "validation", 16)
    images, unseen = pixels(scenes), pixels(held_out)

    autoencoder = Autoencoder()

    def show_reconstructions() -> None:
        with torch.no_grad():
            x = to_float(unseen[:8])
            save_sheet(folder / "reconstructions.png", [x, autoencoder.decode(autoencoder.encode(x)).clamp(-1, 1)])

    identity = {"scenes": options.scenes, "seed": options.seed}
    train(
        "autoencoder", autoencoder, functools.partial(autoencoder_loss, autoencoder, images, 16, options.seed), folder,
        steps=options.autoencoder_steps, lr=8e-4, identity=identity, each=show_reconstructions,
    )  # fmt: skip
    show_reconstructions()
    autoencoder.eval().requires_grad_(False)
    means, deviations = latents_of(autoencoder, images)
    sample = means[0].float()
    mean, std = sample.mean((0, 2, 3)), sample.std((0, 2, 3))
    autoencoder.normalise(mean, std)
    shape = (1, 1, -1, 1, 1)
    latents = ((means - mean.half().view(shape)) / std.half().view(shape), deviations / std.half().view(shape))

    vocabulary = write_tokenizer(folder / "tokenizer", known_words(), TOKENS)
    tokenizer = CLIPTokenizer.from_pretrained(str(folder / "tokenizer"), local_files_only=True)
    model = TextToImage(vocabulary)
    captions = [scene.caption for scene in held_out[:8]]

    def show_samples() -> None:
        samples = draw_samples(model, autoencoder, tokenizer, captions, options.seed)
        save_sheet(folder / "samples.png", [to_float(unseen[:8]), samples], captions)

    loss = train(
        "diffusion", model,
        functools.partial(diffusion_loss, model, tokenizer, scenes, latents, options.batch, options.seed), folder,
        steps=options.diffusion_steps, lr=6e-4, each=show_samples,
        identity={**identity, "batch": options.batch, "latents": [mean.tolist(), std.tolist()]},
    )  # fmt: skip
    show_samples()
    settings = {name: value for name, value in vars(options).items() if not isinstance(value, Path)}
    report = {"settings": settings, "psnr": reconstruction_error(autoencoder, unseen), "noise_error": loss}
    save_model(folder, autoencoder, model, report)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("shapes-data"), help="where rendered scenes are kept")
    parser.add_argument("--output", type=Path, default=Path("shapes-sd"))
    parser.add_argument("--scenes", type=positive, default=10_000, help="of the split train")
    parser.add_argument("--autoencoder-steps", type=positive, default=2400)
    parser.add_argument("--diffusion-steps", type=positive, default=3000)
    parser.add_argument("--batch", type=positive, default=64, help="images in a step of diffusion")
    parser.add_argument("--seed", type=int, default=0, choices=range(1000), metavar="0..999")
    options = parser.parse_args()
    report = run(options)
    psnr, error = report["psnr"], report["noise_error"]
    print(f"{options.output}: PSNR of reconstructions {psnr:.1f} dB, mean squared error of the noise {error:.3f}")


if __name__ == "__main__":
    sys.exit(run_script(main))
