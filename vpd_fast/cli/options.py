"""Options that several commands share, and the model they describe."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from vpd_fast import __version__
from vpd_fast.checkpoints import load_checkpoint
from vpd_fast.checkpoints.reader import read_json
from vpd_fast.config import PRECISIONS, VPDConfig
from vpd_fast.engine import load_engine, optimize
from vpd_fast.engine.storage import SETTINGS
from vpd_fast.errors import InputError, TruncationWarning
from vpd_fast.hub import local_path
from vpd_fast.inference import make_predictor
from vpd_fast.inference.running import AUTO
from vpd_fast.models import VPD
from vpd_fast.models.attention_backends import check_backend
from vpd_fast.models.perceiver import Perceiver
from vpd_fast.models.random_weights import randomize
from vpd_fast.tasks import TASKS


def in_panel(name: str) -> Callable[..., Any]:
    """Return `typer.Option` for the options of one panel of --help."""
    return partial(typer.Option, rich_help_panel=name)


model_option, segmentation_option, referring_option = in_panel("Model"), in_panel("Segmentation"), in_panel("Referring")
depth_option, video_option = in_panel("Depth"), in_panel("Video")
running_option, at_scale_option = in_panel("Running"), in_panel("At scale")

Images = Annotated[
    list[str], typer.Argument(metavar="IMAGES", help="Files, folders (the images in them) and quoted globs.")
]
Checkpoint = Annotated[
    Path | None,
    model_option(
        metavar="PATH",
        help="A released VPD file, a file or folder (also of a fast model) written by this project, a repository of "
        "the Hugging Face hub (owner/name, owner/name@revision, owner/name/file), or a bundled miniature: "
        "shapes-segmentation, shapes-referring, shapes-depth. Its task is recognised.",
    ),
]
Ema = Annotated[
    bool,
    model_option("--ema", help="Of a checkpoint that has both: the averages over the training, not the weights."),
]
RandomWeights = Annotated[
    int | None,
    model_option(metavar="SEED", help="Instead of a checkpoint: random weights, at the size of Stable Diffusion 1.5."),
]
Task = Annotated[
    str | None,
    model_option(
        metavar="TASK", help=f"{', '.join(TASKS)}: what to build with --random-weights, what a checkpoint must hold."
    ),
]
Config = Annotated[
    Path | None, model_option(metavar="FILE", help="With --random-weights: other sizes, a VPDConfig as JSON.")
]
Output = Annotated[Path, running_option("--output", "-o", metavar="FOLDER", help="Where results go; made if needed.")]
Device = Annotated[str, running_option(metavar="NAME", help="cpu, cuda or cuda:N.")]
Precision = Annotated[
    str | None,
    running_option(
        metavar="NAME",
        help="Run the fast form of the model: fp32, bf16 or int8, on GPUs also fp16 or fp8. "
        "[default: the plain model, in fp32]",
    ),
]
AttentionBackend = Annotated[
    str,
    running_option(
        metavar="NAME",
        help="How attention is computed: plain, sdpa, or with their package on a GPU xformers or flash-attn.",
    ),
]
Json = Annotated[bool, running_option("--json", help="Print the results as JSON.")]
Mode = Annotated[
    str | None, segmentation_option(metavar="MODE", help="slide (windows, as published, the default) or whole.")
]
Scales = Annotated[
    str | None,
    segmentation_option(
        metavar="S,S,...",
        help="Average over these relative sizes; published: 1,1.125,1.25,1.375,1.5 with --flip. [default: 1]",
    ),
]
Flip = Annotated[
    bool | None,
    running_option(
        "--flip/--no-flip", help="Average with the mirror image. [default: yes for depth, no for segmentation]"
    ),
]
BatchSize = Annotated[
    str | None,
    running_option(
        metavar="N|auto",
        help="Windows or sentences per forward, also of several images of one size; auto: as many as a GPU's free "
        "memory takes. [default: 1 on a CPU, 8 on a GPU]",
    ),
]
Streams = Annotated[
    int | None,
    running_option(
        metavar="N",
        help="Batches that a CPU computes at once, sharing its threads. [default: 1; small fast models: up to 8]",
    ),
]
Text = Annotated[list[str] | None, referring_option(metavar="SENTENCE", help="What to look for; repeat it for more.")]
TextEncoderName = Annotated[
    str | None,
    referring_option(
        metavar="ID|FOLDER",
        help="CLIP from the Hugging Face hub or a local folder. "
        "[default: what the checkpoint names, or openai/clip-vit-large-patch14]",
    ),
]


@dataclass(frozen=True)
class ModelOptions:
    """The options that say which model to run, where and how; checked when made. Raises InputError."""

    checkpoint: Path | None
    random_weights: int | None
    task: str | None
    config: Path | None
    device: str
    precision: str | None
    attention_backend: str = "plain"
    ema: bool = False

    def __post_init__(self) -> None:
        if self.precision not in (None, *PRECISIONS):
            raise InputError(f"--precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.precision and self.attention_backend != "plain":
            raise InputError("--attention-backend is for the plain model; leave --precision out")
        if self.task is not None and self.task not in TASKS:
            raise InputError(f"--task must be one of {', '.join(TASKS)}, got {self.task!r}")
        if (self.checkpoint is None) == (self.random_weights is None):
            came = "neither" if self.checkpoint is None else "both"
            raise InputError(f"give either --checkpoint PATH or --random-weights SEED, got {came}")
        if self.checkpoint is not None and self.config is not None:
            raise InputError("--config goes with --random-weights; a checkpoint's sizes are found in the file")
        if self.checkpoint is None and self.ema:
            raise InputError("--ema goes with --checkpoint; random weights have no averages")

    def load(self, drawn_on: str = "cpu") -> Perceiver:
        """Load the model for evaluation. Raises InputError, CheckpointError, MissingDependencyError.

        drawn_on: the device that draws random weights; those of a seed are the same wherever a model runs if it is one.
        """
        device = _device(self.device)
        check_backend(self.attention_backend)  # before the weights are read
        place = torch.device("cpu") if self.precision else device  # where layers are converted one by one
        path = None if self.checkpoint is None else local_path(self.checkpoint)
        if path is None:
            assert self.random_weights is not None  # checked when made
            model = _random_model(self.random_weights, self.task, self.config, drawn_on).to(place).eval()
        elif (path / SETTINGS).exists():
            return self._load_engine(path, device)
        else:
            model = load_checkpoint(path, task=self.task, device=place, ema=self.ema, mmap=True)
        if self.precision is not None:
            return optimize(model, self.precision, device=device)
        model.attention_backend = self.attention_backend
        return model

    def _load_engine(self, folder: Path, device: torch.device) -> Perceiver:
        if self.ema:
            raise InputError(f"--ema is for checkpoints; {folder} is a fast model, made of either")
        if self.attention_backend != "plain":
            raise InputError(f"--attention-backend is for plain models; {folder} is a fast model")
        model = load_engine(folder, device)
        if self.precision not in (None, model.precision):
            raise InputError(f"--precision {self.precision}: {folder} is a fast model in {model.precision}")
        if self.task not in (None, model.config.task):
            raise InputError(f"--task {self.task}: {folder} is a {model.config.task} model")
        return model

    def header(self, model: Perceiver, notes: list[str]) -> dict[str, Any]:
        """Return what a results file says about the model."""
        weights = (
            {"random_weights": self.random_weights} if self.checkpoint is None else {"checkpoint": str(self.checkpoint)}
        )
        return {
            "vpd_fast": __version__, "task": model.config.task, **weights, "device": str(model.device),
            "precision": model.precision, "fast": model.is_fast,
            "attention_backend": self.attention_backend, "notes": notes,
        }  # fmt: skip


def batch_size_of(text: str | None) -> int | str | None:
    """Parse --batch-size. Raises InputError."""
    if text in (None, AUTO):
        return text
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"--batch-size must be a positive number or {AUTO}, got {text!r}")
    return int(text)


def scales_of(text: str) -> list[float]:
    """Parse the numbers of --scales. Raises InputError."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--scales must be numbers separated by commas, like 1.0,1.25, got {text!r}") from None


class RandomEncoder:
    """A stand-in for CLIP, so that models with random weights can be tried without it. width: of its token features."""

    def __init__(self, width: int) -> None:
        self.width = width

    def embed_sentences(self, sentences: list[str], tokens: int) -> torch.Tensor:
        """Return `random_tokens` (sentences, tokens, width)."""
        return random_tokens(sentences, tokens, self.width)


def text_encoder(model: Perceiver, name: str | None, random_weights: int | None) -> Any:
    """Return what embeds a referring model's sentences, None for other models.

    A model with random weights and no encoder named gets random tokens.
    """
    config = model.config
    if not TASKS[config.task].takes_text:
        if name is not None:
            raise InputError(f"--text-encoder is for referring models, this is a {config.task} model")
        return None
    if random_weights is not None and name is None:
        return RandomEncoder(config.backbone.context_dim)
    from vpd_fast.models.text import TextEncoder, encoder_name

    return TextEncoder(encoder_name(name, config), device=model.device)


def text_options(model: Perceiver, text: list[str] | None, name: str | None, weights: int | None) -> dict[str, Any]:
    """Return options of the predictor for a referring model's sentences, {} for other models."""
    if TASKS[model.config.task].takes_text and not text:
        raise InputError('referring segmentation needs --text "what to look for"')
    if not TASKS[model.config.task].takes_text:
        if text or name:
            raise InputError(f"--text and --text-encoder are for referring models, this is a {model.config.task} model")
        return {}
    return {"text": text, "text_encoder": text_encoder(model, name, weights)}


def make_noting_predictor(model: Perceiver, chosen: dict[str, Any]) -> Any:
    """Return `make_predictor(model, **chosen)`, whose notes say what it would otherwise warn of."""
    with truncation_noted():
        return make_predictor(model, **chosen)


@contextmanager
def truncation_noted() -> Iterator[None]:
    """Surround what notes words that a text encoder cuts off, in results and on the console: it then does not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        yield


def random_tokens(sentences: list[str], tokens: int, width: int) -> torch.Tensor:
    """Return numbers (sentences, tokens, width) in place of CLIP's: N(0, 1), the same for the same sentence."""
    rows = []
    for sentence in sentences:
        seed = int.from_bytes(hashlib.sha256(sentence.encode()).digest()[:7], "big")
        rows.append(torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(rows)


def notes(random_weights: int | None, encoder: Any) -> list[str]:
    """Return what whoever sees the results must know."""
    found = []
    if random_weights is not None:
        found.append(f"the weights are random (seed {random_weights}): the pictures mean nothing")
    if isinstance(encoder, RandomEncoder):
        found.append("no text encoder: each sentence is turned into random numbers made from its letters")
    return found


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} usable GPUs here")
    return device


def _random_model(seed: int, task: str | None, path: Path | None, device: str) -> VPD:
    if path is None:
        config = VPDConfig(task=task or "segmentation")
    else:
        config = VPDConfig.from_dict(read_json(path))
        if task not in (None, config.task):
            raise InputError(f"--task is {task}, but {path} is the configuration of a {config.task} model")
    return randomize(VPD.empty(config), seed, device)
