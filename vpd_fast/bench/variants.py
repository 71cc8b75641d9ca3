"""The ways to compute the network that are measured, and the model's own: plain, and fast in every precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import convert_conv2d_weight_memory_format

from vpd_fast.bench.parity import Outputs, make_images
from vpd_fast.bench.timing import Stopwatch
from vpd_fast.config import LATENT_STRIDE, VPDConfig
from vpd_fast.models import VPD
from vpd_fast.ops import upsample_argmax

if TYPE_CHECKING:
    from vpd_fast.engine import FastVPD

STAGES = ("encoder", "unet", "head", "post")
WHOLE = "pass"  # the only stage of what cannot be cut into these
MAX_GRAPHS = 64  # that torch.compile makes of one function, which all variants and cases share
BACKBONE = STAGES[:2]  # what variants without maps and head have, too


@dataclass(frozen=True)
class Case:
    """Images of one forward pass."""

    size: int  # height and width in pixels, a multiple of 64
    batch: int = 1

    def __str__(self) -> str:
        return f"{self.batch}x3x{self.size}x{self.size}"

    @property
    def pixels(self) -> int:
        """Pixels of all images."""
        return self.batch * self.size * self.size


@dataclass
class Source:
    """Where a variant's weights come from, and what it may write."""

    checkpoint: Path  # that `load_checkpoint` reads
    scratch: Path  # folder
    threads: int
    device: str = "cpu"

    def load(self) -> VPD:
        """Return the plain model, its weights in the file until they are used."""
        from vpd_fast.checkpoints import load_checkpoint

        return load_checkpoint(self.checkpoint, mmap=True)

    def optimize(self, precision: str) -> FastVPD:
        """Return the fast model."""
        import vpd_fast

        return vpd_fast.optimize(self.load(), precision)


class Variant(Protocol):
    """One way to compute the network, weights loaded."""

    def prepare(self, case: Case) -> None:
        """Get ready for images of this case."""

    def run(self) -> tuple[dict[str, float], Outputs]:
        """One forward pass: seconds of each stage it has, and what came out."""
        ...


def conditioning(config: VPDConfig, batch: int, device: torch.device | str = "cpu") -> tuple:
    """What `VPD.context` takes besides images: the same random sentence, or the first scene, for every image."""
    if config.task == "segmentation":
        return (batch,)
    if config.task == "referring":
        shape = (1, config.tokens, config.backbone.context_dim)
        sentence = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return (sentence.expand(batch, -1, -1).contiguous().to(device),)
    return (torch.zeros(batch, dtype=torch.long, device=device),)


class ModelVariant:
    """A `VPD`, plain or fast, with everything it does for a prediction on images of its own size.

    label: makes labels of logits (B,C,h,w) and a size (H,W); what the model's kind does best. autocast: compute in
    bfloat16 where PyTorch sees fit. channels_last: images are bfloat16 in that format, as the weights are. mode: of
    torch.compile, which compiles everything as one graph for each case; None: it is not compiled. "reduce-overhead" and
    "max-autotune" bring CUDA graphs of their own. graphs: whether a fast model uses its own.
    """

    def __init__(
        self,
        model: VPD | FastVPD,
        label: Callable[..., Tensor],
        *,
        autocast: bool = False,
        channels_last: bool = False,
        mode: str | None = None,
        graphs: bool | None = None,
    ) -> None:
        self.model, self._label, self._graphs = model, label, graphs
        self._autocast, self._channels_last = autocast, channels_last
        self.mode, self._program = mode, None
        if mode is not None:
            torch._dynamo.config.recompile_limit = MAX_GRAPHS
            self._program = torch.compile(self.tensors, mode=mode, dynamic=False, fullgraph=True)

    def prepare(self, case: Case) -> None:
        """Get ready for images of this case."""
        device = self.model.device
        self._images = make_images(case.batch, case.size).to(device)
        if self._channels_last:
            self._images = self._images.to(torch.bfloat16, memory_format=torch.channels_last)
        self._conditioning = conditioning(self.model.config, case.batch, device)

    def run(self) -> tuple[dict[str, float], Outputs]:
        """One forward pass; depth has metres for logits and no labels."""
        device = self.model.device.type
        if self._graphs is not None and not isinstance(self.model, VPD):
            self.model.graphs = self._graphs
        watch = Stopwatch(device)
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=self._autocast):
            if self._program is None:
                tensors = self.tensors(watch.lap)
            else:
                torch.compiler.cudagraph_mark_step_begin()
                tensors = self._program()
                watch.lap(WHOLE)
        return watch.seconds, Outputs(*tensors)

    def tensors(self, lap: Callable[[str], None] = lambda stage: None) -> tuple:
        """Compute the fields of `Outputs`, and call `lap` with the name of each stage at its end."""
        task = self.model.config.task
        latents = self.model.encode(self._images)
        lap("encoder")
        features = self.model.features(latents, self.model.context(*self._conditioning))
        lap("unet")
        logits, labels = self.model.decode(features), None
        lap("head")
        if task != "depth":
            labels = self._label(logits, self._images.shape[2:], align_corners=task == "referring")
            lap("post")
        return latents, features, logits, labels


def plain_labels(logits: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Labels (B,H,W) as the original makes them."""
    return F.interpolate(logits, size, mode="bilinear", align_corners=align_corners).argmax(1)


def make_plain(
    source: Source,
    attention_backend: str = "plain",
    autocast: bool = False,
    channels_last: bool = False,
    mode: str | None = None,
) -> Variant:
    """The plain model in one of its forms, see `ModelVariant`."""
    model = source.load()
    model.attention_backend = attention_backend
    if channels_last:
        model = convert_conv2d_weight_memory_format(model.to(torch.bfloat16), torch.channels_last)
    return ModelVariant(model, plain_labels, autocast=autocast, channels_last=channels_last, mode=mode)


def plain_bytes(config: VPDConfig, case: Case) -> int:
    """Memory for the probabilities that the plain model holds at its peak, which is most of what it needs.

    At latent resolution, in every head: scores and scaled scores, or scaled scores and probabilities, in float32.
    """
    positions = (case.size // LATENT_STRIDE) ** 2
    return 2 * 4 * case.batch * config.backbone.num_heads * positions**2


def make_fast(source: Source, precision: str, graphs: bool | None = None) -> Variant:
    """`vpd_fast.optimize` of the plain model; on a GPU with or without its CUDA graphs."""
    return ModelVariant(source.optimize(precision), upsample_argmax, graphs=graphs)


def make_loaded(_: Source, folder: Path) -> Variant:
    """A fast model that was saved in `folder`, without the weights it was made from."""
    import vpd_fast

    return ModelVariant(vpd_fast.load_engine(folder), upsample_argmax)
