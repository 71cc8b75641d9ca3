"""Inference through the engine, in the place of the original's UNet wrapper and KL encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vpd_fast.checkpoints.infer import ENCODER, UNET, autoencoder_values, infer_backbone
from vpd_fast.config import MAP_SOURCES, SIZE_MULTIPLE, BackboneConfig, VPDConfig
from vpd_fast.engine import FastEncoder, FastVPD, fast_unet
from vpd_fast.errors import InputError, described
from vpd_fast.interop._plain_parts import unchanged
from vpd_fast.models.vpd import VPD

# Of a feature as the engine computes it and the wrapper did, the cosine: weights of 8 bits give 0.98 and more, another
# computation gives less.
MIN_COSINE = 0.9
RESTORE = "call vpd_fast.restore before training, and accelerate again for inference"


class KLMean:
    """The posterior that a fast encoder returns: of the Gaussian it computes the mean only."""

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean

    def mode(self) -> Tensor:
        """The mean, (B,4,H/8,W/8)."""
        return self.mean

    def sample(self) -> Tensor:
        """Raises InputError: there is no variance."""
        raise InputError("a fast KL encoder computes the mean of the latents and no variance: use mode(), or restore")


class FastPart:
    """Stands for a method of a module and runs an engine made of its weights."""

    method: ClassVar[str]

    def __init__(self, name: str, module: Any) -> None:
        self.name, self.module = name or type(module).__name__, module

    def _require_inference(self) -> None:
        if self.module.training and torch.is_grad_enabled():
            raise InputError(f"{self.name} was accelerated for inference, and this is training: {RESTORE}")

    def _check(self, got: list[Tensor], expected: list[Tensor]) -> None:
        """Raises InputError if these are not the same but for rounding."""
        shapes = [[tuple(x.shape) for x in features] for features in (got, expected)]
        if shapes[0] != shapes[1]:
            raise InputError(f"{self.name} returns features of {shapes[1]}, VPD's are {shapes[0]}: {UNSUPPORTED}")
        for a, b in zip(got, expected, strict=True):
            cosine = torch.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()
            if not cosine >= MIN_COSINE:
                raise InputError(f"{self.name} computes something else than VPD's (cosine {cosine:.3f}): {UNSUPPORTED}")


UNSUPPORTED = "precision=None accelerates it exactly"


class FastUNetWrapper(FastPart):
    """The UNet wrapper's `forward`."""

    method: ClassVar[str] = "forward"

    def __init__(self, name: str, module: Any, engine: FastVPD) -> None:
        super().__init__(name, module)
        self.engine = engine

    def forward(
        self, x: Tensor, t: Tensor, c_concat: list[Tensor] | None = None, c_crossattn: list[Tensor] | None = None
    ) -> list[Tensor]:
        """Latents (B,4,h,w), t (B,) of ones, texts [(B,L,C)] -> four features, high resolution first, maps last."""
        self._require_inference()
        if c_concat is not None or not c_crossattn:
            raise InputError(f"{self.name} is accelerated and takes c_crossattn=[context] and no c_concat")
        if not bool((t == 1).all()):
            raise InputError(f"{self.name} was accelerated with a precision, which is for t = 1, got {t.tolist()[:4]}")
        return self.engine.features(x.float(), torch.cat(c_crossattn, 1).float())

    @torch.no_grad()
    def try_out(self) -> None:
        """Raises InputError if the wrapper does not compute what the engine does."""
        side = self.engine.config.base_size // 8 if self.engine.config.use_attn else 16
        generator, device = torch.Generator().manual_seed(0), self.engine.device
        backbone = self.engine.config.backbone
        latents = torch.randn(1, backbone.in_channels, side, side, generator=generator).to(device)
        context = torch.randn(1, 2, backbone.context_dim, generator=generator).to(device)
        arguments = latents, torch.ones(1, dtype=torch.long, device=device)
        try:
            with unchanged(getattr(self.module, "attention_store", None)):
                expected = self.module.forward(*arguments, c_crossattn=[context])
        except Exception as error:
            raise InputError(f"{self.name} cannot be tried out ({described(error)}): {UNSUPPORTED}") from error
        self._check(self.forward(*arguments, c_crossattn=[context]), list(expected))


class FastAutoencoder(FastPart):
    """The KL autoencoder's `encode`."""

    method: ClassVar[str] = "encode"

    def __init__(self, name: str, module: Any, engine: FastEncoder) -> None:
        super().__init__(name, module)
        self.engine = engine

    def encode(self, x: Tensor) -> KLMean:
        """Images (B,3,H,W) in [-1,1] -> their latents' distribution, of which there is the mode."""
        self._require_inference()
        return KLMean(self.engine.encode(x.float()))

    @torch.no_grad()
    def try_out(self) -> None:
        """Raises InputError if the autoencoder does not compute what the engine does."""
        shape = (1, 3, SIZE_MULTIPLE, SIZE_MULTIPLE)
        images = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(self.engine.device) * 2 - 1
        try:
            expected = self.module.encode(images).mode()
        except Exception as error:
            raise InputError(f"{self.name} cannot be tried out ({described(error)}): {UNSUPPORTED}") from error
        self._check([self.encode(images).mode()], [expected])


def fast_unet_wrapper(name: str, wrapper: Any, precision: str) -> FastUNetWrapper:
    """What stands for the wrapper. Raises InputError if it is not VPD's, or for a precision that there is not."""
    unet = wrapper.unet.diffusion_model
    heads = {module.heads for module in unet.modules() if hasattr(module, "to_q") and hasattr(module, "heads")}
    weights = {UNET + key: tensor for key, tensor in unet.state_dict().items()}
    settings = {"base_size": 512, "use_attn": False}
    try:
        if wrapper.use_attn:
            settings = {
                "base_size": 8 * wrapper.size64,
                "use_attn": True,
                "max_attn_size": wrapper.attention_store.max_size,
                "attn_selector": "+".join(wrapper.attn_selector),
            }
            known = all(source in MAP_SOURCES for source in wrapper.attn_selector)
            if not known or any(source.startswith("mid") for source in wrapper.attn_selector):
                raise InputError(f"{name or type(wrapper).__name__} selects {wrapper.attn_selector}: {UNSUPPORTED}")
        (head_count,) = heads
        backbone = infer_backbone(_below(weights, UNET), {}, num_heads=head_count)
        config = VPDConfig(backbone=backbone, **settings)
    except (AttributeError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{type(wrapper).__name__} is no UNetWrapper of VPD ({error}): {UNSUPPORTED}") from error
    return _tried(lambda: FastUNetWrapper(name, wrapper, fast_unet(_carrier(config, weights), precision)))


def fast_autoencoder(name: str, autoencoder: Any, precision: str) -> FastAutoencoder:
    """What stands for the autoencoder. Raises InputError if it is not Stable Diffusion's, or for another precision."""
    weights = {ENCODER + key: tensor for key, tensor in autoencoder.state_dict().items()}
    try:
        values = autoencoder_values(_below(weights, ENCODER))
        backbone = BackboneConfig(in_channels=autoencoder.quant_conv.out_channels // 2, **values)
    except (AttributeError, KeyError, IndexError, ValueError) as error:
        raise InputError(f"{type(autoencoder).__name__} is no KL encoder of Stable Diffusion ({error})") from error
    config = VPDConfig(backbone=backbone)
    return _tried(lambda: FastAutoencoder(name, autoencoder, FastEncoder(_carrier(config, weights), precision)))


def _tried(make: Callable[[], Any]) -> Any:
    part = make()
    part.try_out()
    return part


def _below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, tuple[int, ...]]:
    return {key.removeprefix(prefix): tuple(tensor.shape) for key, tensor in weights.items()}


def _carrier(config: VPDConfig, weights: Mapping[str, Tensor]) -> VPD:
    """A model of which only these weights, which are not copied, and the conditioning are more than shapes."""
    carrier = VPD.empty(config).eval()
    first = next(iter(weights.values()))
    for key, tensor in carrier.state_dict().items():
        if FastVPD.is_conditioning(config, key):
            weights = {**weights, key: torch.zeros(tensor.shape, dtype=first.dtype, device=first.device)}
    carrier.load_state_dict(weights, strict=False, assign=True)
    return carrier
