"""Options that several commands share, and the model they describe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vpd_fast.config import PRECISIONS
from vpd_fast.errors import InputError
from vpd_fast.tasks import TASKS

if TYPE_CHECKING:
    import torch

    from vpd_fast.models import VPD

ENGINE_FILE = "engine.json"  # what makes a folder one of a fast model, see vpd_fast.engine.storage

# Panels of --help.
MODEL, SEGMENTATION, REFERRING, DEPTH, RUNNING = "Model", "Segmentation", "Referring", "Depth", "Running"
AT_SCALE = "At scale"

Images = Annotated[
    list[str], typer.Argument(metavar="IMAGES", help="Files, folders (the images in them) and quoted globs.")
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="A released VPD file, a file or folder (also of a fast model) written by this project, or a bundled "
        "miniature: shapes-segmentation, shapes-referring, shapes-depth. Its task is recognised.",
        rich_help_panel=MODEL,
    ),
]
RandomWeights = Annotated[
    int | None,
    typer.Option(
        metavar="SEED",
        help="Instead of a checkpoint: random weights, at the size of Stable Diffusion 1.5.",
        rich_help_panel=MODEL,
    ),
]
Task = Annotated[
    str | None,
    typer.Option(
        metavar="TASK",
        help=f"{', '.join(TASKS)}: what to build with --random-weights, what a checkpoint must hold.",
        rich_help_panel=MODEL,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="With --random-weights: other sizes, a VPDConfig as JSON.", rich_help_panel=MODEL
    ),
]
Output = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="FOLDER", help="Where results go; made if needed.", rich_help_panel=RUNNING),
]
Device = Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda or cuda:N.", rich_help_panel=RUNNING)]
Precision = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Run the fast form of the model: fp32, bf16 or int8, on GPUs also fp16 or fp8. "
        "[default: the plain model, in fp32]",
        rich_help_panel=RUNNING,
    ),
]
AttentionBackend = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="How attention is computed: plain, sdpa, or with their package on a GPU xformers or flash-attn.",
        rich_help_panel=RUNNING,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the results as JSON.", rich_help_panel=RUNNING)]
Mode = Annotated[
    str | None,
    typer.Option(
        metavar="MODE", help="slide (windows, as published, the default) or whole.", rich_help_panel=SEGMENTATION
    ),
]
Text = Annotated[
    list[str] | None,
    typer.Option(metavar="SENTENCE", help="What to look for; repeat it for more.", rich_help_panel=REFERRING),
]
TextEncoderName = Annotated[
    str | None,
    typer.Option(
        metavar="ID|FOLDER",
        help="CLIP from the Hugging Face hub or a local folder. "
        "[default: what the checkpoint names, or openai/clip-vit-large-patch14]",
        rich_help_panel=REFERRING,
    ),
]


@dataclass(frozen=True)
class ModelOptions:
    """Which model to run, where and how; checked when made. Raises InputError."""

    checkpoint: Path | None
    random_weights: int | None
    task: str | None
    config: Path | None
    device: str
    precision: str | None
    attention_backend: str = "plain"

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

    def load(self) -> VPD:
        """The model on its device, in evaluation mode. Raises InputError, CheckpointError, MissingDependencyError."""
        import torch

        from vpd_fast.models.attention_backends import check_backend

        device = _device(self.device)
        check_backend(self.attention_backend)  # before the weights are read
        place = torch.device("cpu") if self.precision else device  # where layers are converted one by one
        if self.checkpoint is None:
            model = _random_model(self.random_weights, self.task, self.config).to(place).eval()
        elif (self.checkpoint / ENGINE_FILE).exists():
            return self._load_engine(device)
        else:
            from vpd_fast.checkpoints import load_checkpoint

            model = load_checkpoint(self.checkpoint, task=self.task, device=place)
        if self.precision is not None:
            from vpd_fast.engine import optimize

            return optimize(model, self.precision, device=device)
        model.attention_backend = self.attention_backend
        return model

    def _load_engine(self, device: torch.device) -> VPD:
        from vpd_fast.engine import load_engine

        if self.attention_backend != "plain":
            raise InputError(f"--attention-backend is for plain models; {self.checkpoint} is a fast model")
        model = load_engine(self.checkpoint, device)
        if self.precision not in (None, model.precision):
            raise InputError(f"--precision {self.precision}: {self.checkpoint} is a fast model in {model.precision}")
        if self.task not in (None, model.config.task):
            raise InputError(f"--task {self.task}: {self.checkpoint} is a {model.config.task} model")
        return model

    def header(self, model: VPD, notes: list[str]) -> dict[str, Any]:
        """What the results file says about the model."""
        from vpd_fast import __version__

        weights = (
            {"random_weights": self.random_weights} if self.checkpoint is None else {"checkpoint": str(self.checkpoint)}
        )
        return {
            "vpd_fast": __version__, "task": model.config.task, **weights, "device": str(model.device),
            "precision": model.precision, "fast": model.is_fast,
            "attention_backend": self.attention_backend, "notes": notes,
        }  # fmt: skip


def scales_of(text: str) -> list[float]:
    """The numbers of --scales. Raises InputError."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--scales must be numbers separated by commas, like 1.0,1.25, got {text!r}") from None


def text_options(model: VPD, text: list[str] | None, encoder: str | None, random_weights: int | None) -> dict[str, Any]:
    """Options of the predictor for a referring model's sentences, {} for other models.

    A model with random weights and no encoder named gets random tokens, so that it can be tried without CLIP.
    """
    if not TASKS[model.config.task].takes_text:
        if text or encoder:
            raise InputError(f"--text and --text-encoder are for referring models, this is a {model.config.task} model")
        return {}
    if not text:
        raise InputError('referring segmentation needs --text "what to look for"')
    if random_weights is not None and encoder is None:
        return {"text": text, "tokens": random_tokens(text, model.config.tokens, model.config.backbone.context_dim)}
    from vpd_fast.models.text import TextEncoder, encoder_name

    return {"text": text, "text_encoder": TextEncoder(encoder_name(encoder, model.config), device=model.device)}


def random_tokens(sentences: list[str], tokens: int, width: int) -> torch.Tensor:
    """(sentences, tokens, width) numbers that stand in for CLIP's: N(0, 1), the same for the same sentence."""
    import hashlib

    import torch

    rows = []
    for sentence in sentences:
        seed = int.from_bytes(hashlib.sha256(sentence.encode()).digest()[:7], "big")
        rows.append(torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(rows)


def notes(random_weights: int | None, options: dict[str, Any]) -> list[str]:
    """What whoever sees the results must know."""
    found = []
    if random_weights is not None:
        found.append(f"the weights are random (seed {random_weights}): the pictures mean nothing")
    if "tokens" in options:
        found.append("no text encoder: each sentence is turned into random numbers made from its letters")
    return found


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} usable GPUs here")
    return device


def _random_model(seed: int, task: str | None, path: Path | None) -> VPD:
    from vpd_fast.config import VPDConfig
    from vpd_fast.models import VPD
    from vpd_fast.models.random_weights import randomize

    if path is None:
        config = VPDConfig(task=task or "segmentation")
    else:
        from vpd_fast.checkpoints.reader import read_json

        config = VPDConfig.from_dict(read_json(path))
        if task not in (None, config.task):
            raise InputError(f"--task is {task}, but {path} is the configuration of a {config.task} model")
    return randomize(VPD.empty(config), seed)
