"""What the analysis compares: each variant is a change to the configuration of its task, or to the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from vpd_fast import VPD

PRECISIONS = ("fp32", "bf16", "int8", "fp8")
PRETRAINED, RANDOM = "pre-trained", "random UNet"


@dataclass(frozen=True)
class Variant:
    """overrides: of the configuration. random: a UNet without pre-training. adapter: whether the text adapter learns,
    or leaves the text as it is. constants: vectors that are learned, in place of the classes' texts. precisions: also
    measure the trained model in each precision. length: factor on the number of steps. curve: what the plot of accuracy
    against steps calls it; without one, accuracy is measured at the end only."""

    task: str
    name: str
    overrides: tuple[str, ...] = ()
    random: bool = False
    adapter: bool = True
    constants: bool = False
    precisions: bool = False
    length: float = 1.0
    curve: str = ""


def _maps(name: str, selector: str) -> Variant:
    return Variant("segmentation", name, (f"model.attn_selector={selector}",))


# segmentation.yaml and depth.yaml change the UNet at a lower rate than the rest, which suits none but a trained one.
FULL_RATE = ("optimizer.unet_lr_scale=1.0",)
VARIANTS = (
    Variant("segmentation", PRETRAINED, precisions=True),
    Variant("segmentation", PRETRAINED + ", full rate", FULL_RATE, curve=PRETRAINED),
    Variant("segmentation", RANDOM + ", full rate", FULL_RATE, random=True, curve=RANDOM),
    Variant("segmentation", RANDOM, random=True),
    Variant("segmentation", "no text adapter", adapter=False),
    Variant("segmentation", "learned constants, not text", constants=True),
    Variant("segmentation", "no maps", ("model.use_attn=false",)),
    _maps("maps of the up blocks", "up_cross"),
    _maps("maps of the down blocks", "down_cross"),
    _maps("maps of all blocks", "up_cross+mid_cross+down_cross"),
    Variant("referring", PRETRAINED, precisions=True, length=1.5, curve=PRETRAINED),
    Variant("referring", RANDOM, random=True, length=1.5, curve=RANDOM),
    Variant("referring", "no maps", ("model.use_attn=false",), length=1.5),
    Variant("depth", PRETRAINED, FULL_RATE, precisions=True, length=0.3, curve=PRETRAINED),
    Variant("depth", RANDOM, FULL_RATE, random=True, length=0.3, curve=RANDOM),
)


def prepare(model: VPD, variant: Variant, seed: int) -> None:
    """Make of a fresh model what the variant says."""
    backbone = model.backbone
    if not variant.adapter:
        with torch.no_grad():
            backbone.gamma.zero_()  # text + gamma * adapter(text)
        backbone.gamma.requires_grad_(False)
        backbone.text_adapter.requires_grad_(False)
    if variant.constants:
        # As large as the texts they stand for.
        spread = model.class_embeddings.std()
        values = torch.randn(model.class_embeddings.shape, generator=torch.Generator().manual_seed(seed)) * spread
        del model.class_embeddings
        model.class_embeddings = nn.Parameter(values)
