"""What plain and fast models have in common: their calls, and what each task does before and after the network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vpd_fast.config import SIZE_MULTIPLE, VPDConfig
from vpd_fast.models import checks

if TYPE_CHECKING:
    from vpd_fast.inference import Result
    from vpd_fast.models.backbone import Conditioning


class Perceiver:
    """A model that perceives: images and what they are conditioned on in, features and a prediction out.

    `vpd_fast.VPD` is the plain, trainable one, `vpd_fast.engine.FastVPD` the fast one; `is_fast` tells which. Both have
    one subclass for each task.
    """

    task: ClassVar[str]
    is_fast: ClassVar[bool]
    align_corners: ClassVar[bool] = False  # how logits are resized to the image
    config: VPDConfig
    conditioning: Conditioning  # holds text_adapter, gamma and, but for referring models, class_embeddings
    precision: str  # "fp32", "bf16", ...: what a plain model's weights are in, or a fast one was made for

    def __call__(self, *inputs: Any) -> Any:
        """What `forward` returns; a torch.nn.Module has its own, which also runs hooks."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.conditioning.gamma.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of images, features and results."""
        return self.conditioning.gamma.dtype

    def encode(self, images: Tensor) -> Tensor:
        """Images (B,3,H,W) in [-1,1], H and W multiples of 64 -> latents (B,4,H/8,W/8), times `latent_scale`."""
        raise NotImplementedError

    def features(self, latents: Tensor, context: Tensor) -> list[Tensor]:
        """Latents (B,4,h,w), adapted text (B,L,context_dim) -> four features at 1, 1/2, 1/4, 1/8 of the latents' size.

        Channels: `config.feature_channels`, attention maps last (self maps have as many channels as positions).
        """
        raise NotImplementedError

    def _head(self, features: list[Tensor], *size: tuple[int, int] | None) -> Tensor:
        """Features of the right number of channels -> what the network's last layer returns; depth also gets a size."""
        raise NotImplementedError

    def context(self, *args: Any, **kwargs: Any) -> Tensor:
        """Adapted text features (B,L,context_dim); the arguments differ by task."""
        raise NotImplementedError

    def extract_feat(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Features of images (B,3,H,W) in [-1,1], H and W multiples of 64, conditioned as in `forward`."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Images, and what the task is conditioned on, to the prediction; the arguments differ by task."""
        raise NotImplementedError

    def decode(self, features: list[Tensor], size: tuple[int, int] | None = None) -> Tensor:
        """Features -> logits (B,classes,h,w) at 1/8 of the image, or resized bilinearly to `size`."""
        checks.feature_channels(features, self.config.feature_channels)
        checks.size(size)
        logits = self._head(features)
        if size is None:
            return logits
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=self.align_corners)

    def split_maps(self, features: list[Tensor]) -> tuple[list[Tensor], dict[int, Tensor]]:
        """Undo the concatenation: features without maps, and {level: cross-attention maps (B,L,h,w)}."""
        checks.features_of_levels(features, len(self.config.feature_channels))
        widths = [self.config.backbone.model_channels * m for m in self.config.backbone.channel_mult]
        tokens = self.config.context_tokens if any("cross" in s for s in self.config.map_sources) else 0
        plain = [f[:, :width] for f, width in zip(features, widths, strict=True)]
        maps = {
            level: f[:, width : width + tokens]
            for level, (f, width) in enumerate(zip(features, widths, strict=True))
            if tokens and f.shape[1] > width
        }
        return plain, maps

    def predict(self, source: Any, **options: Any) -> Result | list[Result] | list[Result | Exception]:
        """Predict on a path, PIL image, ndarray, tensor or list, of any size; see `vpd_fast.inference.predict`."""
        from vpd_fast.inference import predict

        return predict(self, source, **options)

    def push_to_hub(self, name: str, **options: Any) -> str:
        """Upload the model, plain or fast, with a card to the repository "owner/name" of the Hugging Face hub.

        options: metrics ({"mIoU": 0.53}), dataset, revision, private, token, message; see `vpd_fast.hub.push`.
        Returns the address of the commit.
        """
        from vpd_fast.hub import push

        precision = self.precision if self.is_fast else None
        return push(name, self._save, self.config, precision=precision, **options)

    def _save(self, folder: Path) -> None:
        """Write the model into a folder."""
        raise NotImplementedError

    def _check_latents(self, latents: Tensor, context: Tensor) -> None:
        """Raises InputError unless they are what `features` takes."""
        backbone, place = self.config.backbone, (self.device, self.dtype)
        checks.latents(latents, backbone.in_channels, 2 ** (len(backbone.channel_mult) - 1), *place)
        checks.context(context, latents.shape[0], backbone.context_dim, *place)

    def _adapted(self, texts: Tensor) -> Tensor:
        """Text features (..., context_dim) through the text adapter."""
        return self.conditioning.text_adapter(texts, self.conditioning.gamma)


class SegmentationPerceiver(Perceiver):
    """Semantic segmentation: the class embeddings are the context, one token each."""

    task = "segmentation"

    def context(self, batch_size: int = 1) -> Tensor:
        """Adapted class embeddings (batch_size,num_classes,context_dim), the same for every image."""
        checks.batch_size(batch_size)
        return self._adapted(self.conditioning.class_embeddings).expand(batch_size, -1, -1)

    def extract_feat(self, images: Tensor) -> list[Tensor]:
        """Features of images in [-1,1]; see `features`."""
        return self.features(self.encode(images), self.context(images.shape[0]))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B,3,H,W) in [-1,1], H and W multiples of 64 -> logits (B,num_classes,H,W)."""
        features = self.extract_feat(images)
        height, width = images.shape[2:]
        return self.decode(features, (height, width))


class ReferringPerceiver(Perceiver):
    """Referring segmentation: the tokens of a sentence are the context; two logits per pixel."""

    task = "referring"
    align_corners = True

    def context(self, tokens: Tensor) -> Tensor:
        """CLIP token features (B,tokens,context_dim) -> the same shape, adapted."""
        expected = (self.config.tokens, self.config.backbone.context_dim)
        checks.tokens(tokens, expected, self.device, self.dtype)
        return self._adapted(tokens)

    def extract_feat(self, images: Tensor, tokens: Tensor) -> list[Tensor]:
        """Features of images in [-1,1], one sentence (T,context_dim) each; see `features`."""
        checks.same_batch(images, tokens, "tokens")
        return self.features(self.encode(images), self.context(tokens))

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Images (B,3,H,W) in [-1,1], H and W multiples of 64, tokens (B,T,context_dim) -> logits (B,2,H,W)."""
        features = self.extract_feat(images, tokens)
        height, width = images.shape[2:]
        return self.decode(features, (height, width))


class DepthPerceiver(Perceiver):
    """Monocular depth: one scene embedding is the context."""

    task = "depth"

    def context(self, class_ids: Tensor | None = None, batch_size: int = 1) -> Tensor:
        """Adapted embedding (B,1,context_dim) of the scenes `class_ids` (B,) long; None: the mean over all scenes."""
        scenes = self.conditioning.class_embeddings
        if class_ids is None:
            checks.batch_size(batch_size)
            return self._adapted(scenes.mean(0, keepdim=True))[:, None].expand(batch_size, -1, -1)
        checks.class_ids(class_ids, self.config.num_scenes, self.device)
        return self._adapted(scenes[class_ids])[:, None]

    def extract_feat(self, images: Tensor, class_ids: Tensor | None = None) -> list[Tensor]:
        """Features of images in [-1,1], one scene id each or none; see `features`."""
        if class_ids is not None:
            checks.same_batch(images, class_ids, "class_ids")
        return self.features(self.encode(images), self.context(class_ids, images.shape[0]))

    def decode(self, features: list[Tensor], size: tuple[int, int] | None = None) -> Tensor:
        """Features -> depth (B,1,H,W) in metres; `size` cuts off padding at the right and bottom (multiples of 32).

        An infinite output of the head is NaN here, not the depth 0 or max_depth.
        """
        checks.feature_channels(features, self.config.feature_channels)
        checks.size(size)
        x = self._head(features, size)
        # x - x is 0, but NaN where x is infinite, of which a sigmoid would make the depth 0 or max_depth.
        return torch.sigmoid(x + (x - x)) * self.config.max_depth

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
