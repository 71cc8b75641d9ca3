"""VPD models: KL encoder, one UNet pass conditioned on text, attention maps as features, a head per task.

Source: Zhao et al., "Unleashing Text-to-Image Diffusion Models for Visual Perception", ICCV 2023. State-dict keys are
those of the released checkpoints. What is never run (the diffusion schedule `sd_model.*`, the UNet's `out.*`) has
no parameters here and is ignored when a state dict is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vpd_fast.config import PRECISIONS, SIZE_MULTIPLE, VPDConfig
from vpd_fast.errors import InputError, brief
from vpd_fast.models import checks
from vpd_fast.models.attention import CrossAttention
from vpd_fast.models.attention_backends import PLAIN, check_backend
from vpd_fast.models.autoencoder import AttnBlock
from vpd_fast.models.backbone import Backbone, Conditioning
from vpd_fast.models.depth_head import DepthDecoder, FeatureMerge, last_layer_depth
from vpd_fast.models.meta import on_meta_device
from vpd_fast.models.perceiver import DepthPerceiver, Perceiver, ReferringPerceiver, SegmentationPerceiver
from vpd_fast.models.referring_head import SimpleDecoding
from vpd_fast.models.segmentation_head import FPN, FPNHead

if TYPE_CHECKING:
    from vpd_fast.checkpoints import LoadReport


UNUSED_KEYS = ("sd_model.", "unet.unet.diffusion_model.out.", "encoder.unet.unet.diffusion_model.out.")


class VPD(Backbone, Perceiver):
    """`VPD(config)` makes the model of `config.task`: a VPDSegmentation, VPDReferring or VPDDepth."""

    is_fast = False
    load_report: LoadReport  # only of a model that was loaded from a checkpoint
    _attention_backend = PLAIN

    def __new__(cls, config: VPDConfig | None = None) -> VPD:
        if cls is VPD:
            if not isinstance(config, VPDConfig):
                raise InputError(f"VPD: config must be a VPDConfig, got {type(config).__name__}")
            return object.__new__(_MODELS[config.task])
        return object.__new__(cls)

    def __init__(self, config: VPDConfig) -> None:
        super().__init__()
        if config.task != self.task:
            raise InputError(f"{type(self).__name__}: config.task must be {self.task!r}, got {config.task!r}")
        self.config = config

    @property
    def backbone(self) -> Backbone:
        """The module that holds encoder_vq, unet, text_adapter and gamma: the model itself, or depth's `encoder`."""
        return self

    @property
    def conditioning(self) -> Conditioning:
        """The same module, which text adapter and embeddings are a part of."""
        return self.backbone

    @property
    def precision(self) -> str:
        """Name of the parameters' dtype, as `optimize` has it."""
        dtype = str(self.dtype).removeprefix("torch.")
        return next((name for name, known in PRECISIONS.items() if known == dtype), dtype)

    @property
    def attention_backend(self) -> str:
        """How attention is computed: "plain", "sdpa", "xformers" or "flash-attn".

        "plain" (the default) writes it out as the original does. The others never store the probabilities: they use
        `vpd_fast.ops.cross_attention_maps` for the text and for maps, and the named library for self-attention in
        the UNet; the KL encoder's attention goes through SDPA.
        It belongs to this object, not to `config`: it says how to run, not what the model is.

        Setting it raises InputError for other names and MissingDependencyError if the package is not installed. Running
        raises InputError if the library cannot take the tensors: xformers needs a GPU, flash-attn 16 bits as well.
        """
        return self._attention_backend

    @attention_backend.setter
    def attention_backend(self, name: str) -> None:
        check_backend(name)
        self._attention_backend = name
        for module in self.modules():
            if isinstance(module, (CrossAttention, AttnBlock)):
                module.attention_backend = name

    def encode(self, images: Tensor) -> Tensor:
        checks.images(images, self.device, self.dtype, SIZE_MULTIPLE)
        with torch.set_grad_enabled(self.config.train_encoder and torch.is_grad_enabled()):
            latents = self.backbone.encoder_vq.encode(images)
        return latents if self.config.latent_scale == 1.0 else latents * self.config.latent_scale

    def features(self, latents: Tensor, context: Tensor) -> list[Tensor]:
        self._check_latents(latents, context)
        config, levels = self.config.backbone, len(self.config.backbone.channel_mult)
        # Channels in a group at the lowest level, where the first block has those of the level above.
        per_group = config.model_channels * min(config.channel_mult[-2:]) // 32
        if per_group == 1 and latents.shape[0] * latents[0, 0].numel() == 4 ** (levels - 1):
            raise InputError(
                "the UNet's group norms have one number per group, of which there are no statistics, for one image of "
                f"64x64 with model_channels={config.model_channels}: take larger images (size), at least 2 of them "
                "(batch_size), or more model_channels"
            )
        if self.attention_backend != PLAIN and context.stride(0) == 0:
            context = context[:1]  # one text for all images: its keys and values are computed once
        return self.backbone.unet(latents, context)

    def gradient_checkpointing_enable(self, levels: bool | Iterable[int] = True) -> None:
        """Less memory in training: residual and transformer blocks are recomputed in backward, maps are not.

        levels: of the UNet, 0 the finest (1/8 of the image) to 3, which the middle block belongs to; True: all, False:
        none. The finest levels hold most of the memory. Raises InputError for a level that there is not.
        """
        count = len(self.config.backbone.channel_mult)
        known = range(count)
        if not isinstance(levels, (bool, Iterable)) or isinstance(levels, Tensor):
            raise InputError(f"levels must be True, False or numbers of levels, got {brief(type(levels))}")
        chosen = (known if levels else ()) if isinstance(levels, bool) else tuple(levels)
        wrong = [level for level in chosen if not isinstance(level, int) or level not in known]
        if wrong:
            raise InputError(f"levels must be 0 to {count - 1}, got {brief(wrong[0])}")
        self.backbone.unet.set_gradient_checkpointing(chosen)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> torch.nn.modules.module._IncompatibleKeys:
        """Load a state dict as torch.nn.Module does, without what VPD never runs (`sd_model.*`, the UNet's `out.*`)."""
        if not isinstance(state_dict, Mapping) or not all(isinstance(key, str) for key in state_dict):
            raise InputError(f"state_dict must map names to tensors, got {brief(state_dict)}")
        used = {key: value for key, value in state_dict.items() if not key.startswith(UNUSED_KEYS)}
        return super().load_state_dict(used, strict=strict, assign=assign)

    @classmethod
    def empty(cls, config: VPDConfig) -> VPD:
        """The model on the meta device: no storage, no initialisation; for loading with assign=True."""
        with on_meta_device():
            return cls(config)

    # Users expect the methods below on the model. They import rooms above this one, so they do it when called.

    @classmethod
    def from_checkpoint(cls, path: str | Path, **options: Any) -> VPD:
        """A released or own checkpoint of any task; options as in `vpd_fast.checkpoints.load_checkpoint`."""
        from vpd_fast.checkpoints import load_checkpoint

        return load_checkpoint(path, **{"task": getattr(cls, "task", None), **options})

    @classmethod
    def from_stable_diffusion(cls, path: str | Path, config: VPDConfig, **options: Any) -> VPD:
        """Start fine-tuning from Stable Diffusion; options as in `vpd_fast.checkpoints.load_stable_diffusion`."""
        from vpd_fast.checkpoints import load_stable_diffusion

        return load_stable_diffusion(path, config, **options)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> VPD:
        """Read a folder written by `save_pretrained`, a repository of the Hugging Face hub ("owner/name"; options
        revision, token, cache_dir, local_files_only), or weights that come with the package, "shapes-segmentation",
        "shapes-referring" or "shapes-depth": miniatures trained on `vpd_fast.data.shapes`, without network."""
        from vpd_fast.checkpoints import load_pretrained

        return load_pretrained(folder, **{"task": getattr(cls, "task", None), **options})

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into `folder`."""
        from vpd_fast.checkpoints import save_pretrained

        save_pretrained(self, folder)

    def _save(self, folder: Path) -> None:
        self.save_pretrained(folder)


class VPDSegmentation(SegmentationPerceiver, VPD):
    """Semantic segmentation: the class embeddings are the context, one token each; Semantic FPN as head."""

    def __init__(self, config: VPDConfig) -> None:
        super().__init__(config)
        self.add_backbone(config)
        self.neck = FPN(config.feature_channels, config.channels)
        self.decode_head = FPNHead(config.channels, config.num_classes)

    def _head(self, features: list[Tensor], *size: tuple[int, int] | None) -> Tensor:
        return self.decode_head(self.neck(features))


class VPDReferring(ReferringPerceiver, VPD):
    """Referring segmentation: the tokens of a sentence are the context; two logits per pixel."""

    def __init__(self, config: VPDConfig) -> None:
        super().__init__(config)
        self.add_backbone(config)
        self.classifier = SimpleDecoding(config.feature_channels)

    def _head(self, features: list[Tensor], *size: tuple[int, int] | None) -> Tensor:
        return self.classifier(features)


class VPDDepth(DepthPerceiver, VPD):
    """Monocular depth: one scene embedding is the context."""

    def __init__(self, config: VPDConfig) -> None:
        super().__init__(config)
        width = config.feature_channels[0]
        if width % 16:
            raise InputError(
                f"VPDDepth: the first feature has {width} channels with its maps, which 16 groups do not divide; "
                "set use_attn=False or a smaller max_attn_size"
            )
        self.encoder = FeatureMerge(config.feature_channels)
        self.encoder.add_backbone(config)
        self.decoder = DepthDecoder()
        self.last_layer_depth = last_layer_depth()

    @property
    def backbone(self) -> Backbone:
        """The module that holds encoder_vq, unet, text_adapter and gamma."""
        return self.encoder

    @property
    def class_embeddings(self) -> Tensor:
        """Scene embeddings (num_scenes, context_dim)."""
        return self.encoder.class_embeddings

    def _head(self, features: list[Tensor], *size: tuple[int, int] | None) -> Tensor:
        merged = self.encoder.merge(features)
        for height, width in filter(None, size):
            merged = merged[:, :, : height // 32, : width // 32]
        return self.last_layer_depth(self.decoder(merged))


_MODELS: dict[str, type[VPD]] = {cls.task: cls for cls in (VPDSegmentation, VPDReferring, VPDDepth)}
