"""VPD models: KL encoder, one UNet pass conditioned on text, attention maps as features, a head per task.

Source: Zhao et al., "Unleashing Text-to-Image Diffusion Models for Visual Perception", ICCV 2023. State-dict keys are
those of the released checkpoints. What is never run (the diffusion schedule `sd_model.*`, the UNet's `out.*`) has
no parameters here and is ignored when a state dict is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vpd_fast.config import SIZE_MULTIPLE, VPDConfig
from vpd_fast.errors import InputError
from vpd_fast.models import checks
from vpd_fast.models.attention import CrossAttention
from vpd_fast.models.attention_backends import PLAIN, check_backend
from vpd_fast.models.autoencoder import AttnBlock, AutoencoderKL
from vpd_fast.models.depth_head import DepthDecoder, FeatureMerge, last_layer_depth
from vpd_fast.models.referring_head import SimpleDecoding
from vpd_fast.models.segmentation_head import FPN, FPNHead
from vpd_fast.models.text_adapter import TextAdapter
from vpd_fast.models.unet import UNetWrapper

if TYPE_CHECKING:
    from vpd_fast.checkpoints import LoadReport
    from vpd_fast.inference import Result

UNUSED_KEYS = ("sd_model.", "unet.unet.diffusion_model.out.", "encoder.unet.unet.diffusion_model.out.")


class _NoRandomNumbers(TorchFunctionMode):
    """Initialisers do nothing. On the meta device some would make PyTorch import its compiler, for 150 MiB."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.normal_, Tensor.uniform_) or getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


class VPD(nn.Module):
    """`VPD(config)` makes the model of `config.task`: a VPDSegmentation, VPDReferring or VPDDepth."""

    task: ClassVar[str]
    load_report: LoadReport  # only of a model that was loaded from a checkpoint
    _attention_backend = PLAIN

    def __new__(cls, config: VPDConfig | None = None) -> VPD:
        if cls is VPD:
            if not isinstance(config, VPDConfig):
                raise InputError(f"VPD: config must be a VPDConfig, got {type(config).__name__}")
            cls = _MODELS[config.task]
        return super().__new__(cls)

    def __init__(self, config: VPDConfig) -> None:
        super().__init__()
        if config.task != self.task:
            raise InputError(f"{type(self).__name__}: config.task must be {self.task!r}, got {config.task!r}")
        self.config = config

    def _add_backbone(self, holder: nn.Module) -> None:
        """Give `holder` (the model itself, or depth's `encoder`) the parts that all tasks have in common."""
        config = self.config
        holder.encoder_vq = AutoencoderKL(config.backbone).requires_grad_(config.train_encoder)
        holder.unet = UNetWrapper(config)
        holder.text_adapter = TextAdapter(config.backbone.context_dim, config.text_hidden_dim)
        holder.gamma = nn.Parameter(torch.full((config.backbone.context_dim,), config.gamma_init_value))

    @property
    def backbone(self) -> nn.Module:
        """The module that holds encoder_vq, unet, text_adapter and gamma."""
        return self

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.backbone.gamma.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return self.backbone.gamma.dtype

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
        """Images (B,3,H,W) in [-1,1], H and W multiples of 64 -> latents (B,4,H/8,W/8), times `latent_scale`."""
        checks.images(images, self.device, self.dtype, SIZE_MULTIPLE)
        with torch.set_grad_enabled(self.config.train_encoder and torch.is_grad_enabled()):
            latents = self.backbone.encoder_vq.encode(images)
        return latents if self.config.latent_scale == 1.0 else latents * self.config.latent_scale

    def features(self, latents: Tensor, context: Tensor) -> list[Tensor]:
        """Latents (B,4,h,w), adapted text (B,L,context_dim) -> four features at 1, 1/2, 1/4, 1/8 of the latents' size.

        Channels: `config.feature_channels`, attention maps last (self maps have as many channels as positions).
        """
        if self.attention_backend != PLAIN and context.stride(0) == 0:
            context = context[:1]  # one text for all images: its keys and values are computed once
        return self.backbone.unet(latents, context)

    def context(self, *conditioning: Any) -> Tensor:
        """Adapted text features (B,L,context_dim); the arguments differ by task."""
        raise NotImplementedError

    def extract_feat(self, images: Tensor, *conditioning: Any) -> list[Tensor]:
        """Features of images (B,3,H,W) in [-1,1], H and W multiples of 64, conditioned as in `forward`."""
        raise NotImplementedError

    def split_maps(self, features: list[Tensor]) -> tuple[list[Tensor], dict[int, Tensor]]:
        """Undo the concatenation: features without maps, and {level: cross-attention maps (B,L,h,w)}."""
        widths = [self.config.backbone.model_channels * m for m in self.config.backbone.channel_mult]
        tokens = self.config.context_tokens if any("cross" in s for s in self.config.map_sources) else 0
        plain = [f[:, :width] for f, width in zip(features, widths, strict=True)]
        maps = {
            level: f[:, width : width + tokens]
            for level, (f, width) in enumerate(zip(features, widths, strict=True))
            if tokens and f.shape[1] > width
        }
        return plain, maps

    def gradient_checkpointing_enable(self, levels: bool | Iterable[int] = True) -> None:
        """Less memory in training: residual and transformer blocks are recomputed in backward, maps are not.

        levels: of the UNet, 0 the finest (1/8 of the image) to 3, which the middle block belongs to; True: all, False:
        none. The finest levels hold most of the memory. Raises InputError for a level that there is not.
        """
        count = len(self.config.backbone.channel_mult)
        known = range(count)
        chosen = (known if levels else ()) if isinstance(levels, bool) else tuple(levels)
        wrong = [level for level in chosen if level not in known]
        if wrong:
            raise InputError(f"levels must be 0 to {count - 1}, got {wrong[0]!r}")
        self.backbone.unet.set_gradient_checkpointing(chosen)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> torch.nn.modules.module._IncompatibleKeys:
        """As torch's, but what VPD never runs (`sd_model.*`, the UNet's `out.*`) is left out first."""
        used = {key: value for key, value in state_dict.items() if not key.startswith(UNUSED_KEYS)}
        return super().load_state_dict(used, strict=strict, assign=assign)

    @classmethod
    def empty(cls, config: VPDConfig) -> VPD:
        """The model on the meta device: no storage, no initialisation; for loading with assign=True."""
        with torch.device("meta"), _NoRandomNumbers():
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
        """Read a folder written by `save_pretrained`, or weights that come with the package, "shapes-segmentation",
        "shapes-referring" or "shapes-depth": miniatures trained on `vpd_fast.data.shapes`, without network."""
        from vpd_fast.checkpoints import load_pretrained

        return load_pretrained(folder, **{"task": getattr(cls, "task", None), **options})

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into `folder`."""
        from vpd_fast.checkpoints import save_pretrained

        save_pretrained(self, folder)

    def predict(self, source: Any, **options: Any) -> Result | list[Result]:
        """Predict on a path, PIL image, ndarray, tensor or list, of any size; see `vpd_fast.inference.predict`."""
        from vpd_fast.inference import predict

        return predict(self, source, **options)


class VPDSegmentation(VPD):
    """Semantic segmentation: the class embeddings are the context, one token each; Semantic FPN as head."""

    task = "segmentation"

    def __init__(self, config: VPDConfig) -> None:
        super().__init__(config)
        self._add_backbone(self)
        self.register_buffer("class_embeddings", torch.zeros(config.num_classes, config.backbone.context_dim))
        self.neck = FPN(config.feature_channels, config.channels)
        self.decode_head = FPNHead(config.channels, config.num_classes)

    def context(self, batch_size: int = 1) -> Tensor:
        """Adapted class embeddings (batch_size,num_classes,context_dim), the same for every image."""
        return self.text_adapter(self.class_embeddings, self.gamma).expand(batch_size, -1, -1)

    def extract_feat(self, images: Tensor) -> list[Tensor]:
        """Features of images in [-1,1]; see `features`."""
        return self.features(self.encode(images), self.context(images.shape[0]))

    def decode(self, features: list[Tensor], size: tuple[int, int] | None = None) -> Tensor:
        """Features -> logits (B,num_classes,h,w) at 1/8 of the image, or resized bilinearly to `size`."""
        checks.feature_channels(features, self.config.feature_channels)
        logits = self.decode_head(self.neck(features))
        return logits if size is None else F.interpolate(logits, size=size, mode="bilinear", align_corners=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B,3,H,W) in [-1,1], H and W multiples of 64 -> logits (B,num_classes,H,W)."""
        return self.decode(self.extract_feat(images), images.shape[2:])


class VPDReferring(VPD):
    """Referring segmentation: the tokens of a sentence are the context; two logits per pixel."""

    task = "referring"

    def __init__(self, config: VPDConfig) -> None:
        super().__init__(config)
        self._add_backbone(self)
        self.classifier = SimpleDecoding(config.feature_channels)

    def context(self, tokens: Tensor) -> Tensor:
        """CLIP token features (B,tokens,context_dim) -> the same shape, adapted."""
        expected = (self.config.tokens, self.config.backbone.context_dim)
        checks.tokens(tokens, expected, self.device, self.dtype)
        return self.text_adapter(tokens, self.gamma)

    def extract_feat(self, images: Tensor, tokens: Tensor) -> list[Tensor]:
        """Features of images in [-1,1], one sentence (T,context_dim) each; see `features`."""
        checks.same_batch(images, tokens, "tokens")
        return self.features(self.encode(images), self.context(tokens))

    def decode(self, features: list[Tensor], size: tuple[int, int] | None = None) -> Tensor:
        """Features -> logits (B,2,h,w) at 1/8 of the image, or resized bilinearly (align_corners) to `size`."""
        checks.feature_channels(features, self.config.feature_channels)
        logits = self.classifier(features)
        return logits if size is None else F.interpolate(logits, size=size, mode="bilinear", align_corners=True)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Images (B,3,H,W) in [-1,1], H and W multiples of 64, tokens (B,T,context_dim) -> logits (B,2,H,W)."""
        return self.decode(self.extract_feat(images, tokens), images.shape[2:])


class VPDDepth(VPD):
    """Monocular depth: one scene embedding is the context."""

    task = "depth"

    def __init__(self, config: VPDConfig) -> None:
        super().__init__(config)
        width = config.feature_channels[0]
        if width % 16:
            raise InputError(
                f"VPDDepth: the first feature has {width} channels with its maps, which 16 groups do not divide; "
                "set use_attn=False or a smaller max_attn_size"
            )
        self.encoder = FeatureMerge(config.feature_channels)
        self._add_backbone(self.encoder)
        embeddings = torch.zeros(config.num_scenes, config.backbone.context_dim)
        self.encoder.register_buffer("class_embeddings", embeddings)
        self.decoder = DepthDecoder()
        self.last_layer_depth = last_layer_depth()

    @property
    def backbone(self) -> nn.Module:
        """The module that holds encoder_vq, unet, text_adapter and gamma."""
        return self.encoder

    @property
    def class_embeddings(self) -> Tensor:
        """Scene embeddings (num_scenes, context_dim)."""
        return self.encoder.class_embeddings

    def context(self, class_ids: Tensor | None = None, batch_size: int = 1) -> Tensor:
        """Adapted embedding (B,1,context_dim) of the scenes `class_ids` (B,) long; None: the mean over all scenes."""
        if class_ids is None:
            mean = self.class_embeddings.mean(0, keepdim=True)
            return self.encoder.text_adapter(mean, self.encoder.gamma)[:, None].expand(batch_size, -1, -1)
        checks.class_ids(class_ids, self.config.num_scenes, self.device)
        return self.encoder.text_adapter(self.class_embeddings[class_ids], self.encoder.gamma)[:, None]

    def extract_feat(self, images: Tensor, class_ids: Tensor | None = None) -> list[Tensor]:
        """Features of images in [-1,1], one scene id each or none; see `features`."""
        if class_ids is not None:
            checks.same_batch(images, class_ids, "class_ids")
        return self.features(self.encode(images), self.context(class_ids, images.shape[0]))

    def decode(self, features: list[Tensor], size: tuple[int, int] | None = None) -> Tensor:
        """Features -> depth (B,1,H,W) in metres; `size` cuts off padding at the right and bottom (multiples of 32)."""
        checks.feature_channels(features, self.config.feature_channels)
        merged = self.encoder.merge(features)
        if size is not None:
            merged = merged[:, :, : size[0] // 32, : size[1] // 32]
        return torch.sigmoid(self.last_layer_depth(self.decoder(merged))) * self.config.max_depth

    def forward(self, images: Tensor, class_ids: Tensor | None = None) -> dict[str, Tensor]:
        """Images (B,3,H,W) in [0,1], H and W multiples of 32, class_ids (B,) long -> {"pred_d": (B,1,H,W) metres}.

        Sides that are not multiples of 64 are padded with mid-grey at the right and bottom, and the padding's features
        are cut off before the decoder: at 480x480 and 352x352 exactly what the original code does.
        """
        checks.images(images, self.device, self.dtype, 32)
        height, width = images.shape[2:]
        padding = (0, -width % SIZE_MULTIPLE, 0, -height % SIZE_MULTIPLE)
        features = self.extract_feat(F.pad(images * 2.0 - 1.0, padding), class_ids)
        return {"pred_d": self.decode(features, (height, width))}


_MODELS: dict[str, type[VPD]] = {cls.task: cls for cls in (VPDSegmentation, VPDReferring, VPDDepth)}
