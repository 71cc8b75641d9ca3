"""VPD as a segmentor of mmsegmentation 1.x: mmengine's Runner trains and tests it, MMSegInferencer predicts with it.

Importing this module registers `VPDSegmentor` with mmseg's models, which a config asks for by

    custom_imports = dict(imports=["vpd_fast.interop.mmseg"])

mmcv-lite suffices; full mmcv is used as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from vpd_fast.config import PRECISIONS
from vpd_fast.engine import optimize
from vpd_fast.errors import CheckpointError, ImageError, InputError, MissingDependencyError, brief, described
from vpd_fast.fields import build
from vpd_fast.inference.finite import NOT_FINITE, FiniteCheck
from vpd_fast.inference.running import batch_size_for, evaluating, run_batches
from vpd_fast.inference.windows import WindowGrid
from vpd_fast.interop._mmcv_lite import fill_in_for_operators
from vpd_fast.interop._mmengine_files import allow_checkpoints_of_mmengine
from vpd_fast.interop._mmseg_network import NetworkSource
from vpd_fast.interop._mmseg_original import settings_of
from vpd_fast.interop._mmseg_settings import TestSettings, TrainSettings
from vpd_fast.labels import IGNORED, default_names
from vpd_fast.models.perceiver import SegmentationPerceiver
from vpd_fast.models.vpd import UNUSED_KEYS
from vpd_fast.ops import upsample_argmax
from vpd_fast.pictures.palette import palette
from vpd_fast.training.losses import segmentation_loss

try:
    fill_in_for_operators()
    allow_checkpoints_of_mmengine()
    _models, _registry, _structures = (import_module(f"mmseg.{name}") for name in ("models", "registry", "structures"))
    _PixelData = import_module("mmengine.structures").PixelData
except (ImportError, AssertionError) as error:  # mmseg asserts which versions of mmcv it takes
    raise MissingDependencyError(
        'mmsegmentation 1.x needs `pip install "vpd_fast[mmseg]"`, and mmcv-lite or mmcv below 2.2 '
        f"({described(error)})"
    ) from error

_BaseSegmentor: Any = _models.BaseSegmentor
_FLIPS = {"horizontal": -1, "vertical": -2}
_NETWORK = "network."


class VPDSegmentor(_BaseSegmentor):
    """VPD's network for semantic segmentation, with mmseg's conventions.

    Its `state_dict` has the names of VPD's released checkpoints: what the Runner saves is a checkpoint for
    `VPD.from_checkpoint` too, and `load_from` takes released files.

    checkpoint: what `VPD.from_checkpoint` takes: a released file, a file or folder of this package, a bundled name, a
        repository of the Hugging Face hub. stable_diffusion: weights to begin fine-tuning with, in place of it.
        Neither: random weights, for `load_from` and `resume`.
    class_embeddings: a file with one tensor (classes, context_dim). None: the checkpoint's, or text_encoder's of the
        class names. text_encoder: a CLIP folder or hub id; None: the default one.
    ema: begin with the averages over the training that the file has.
    num_classes, class_names: one of them suffices; with a checkpoint neither is needed. class_names that the checkpoint
        does not have give it another head. 150 classes without names are ADE20K's.
    settings: other fields of `vpd_fast.VPDConfig`, such as base_size, channels, attn_selector or backbone=dict(...).
    attention_backend: of the plain model, "sdpa" as in `vpd-fast train`, "plain", "xformers" or "flash-attn".
    precision: None predicts with the plain model. "fp32", "bf16", "int8", ...: with what `vpd_fast.optimize` makes of
        it, in evaluation mode, beside the plain weights; it is made anew after train(), eval() and loading weights.
    auxiliary_head: a config of mmseg's heads, or a list of them, on the neck's four maps, for training.
    train_cfg, test_cfg: see `TrainSettings` and `TestSettings`. None: the defaults.
    data_preprocessor: None: mmseg's SegDataPreProcessor with VPD's normalisation, images in [-1, 1].
    pretrained: must be None; mmseg's `init_model` sets it.

    Raises InputError, CheckpointError; each says what to change.
    """

    align_corners = False

    def __init__(
        self,
        checkpoint: str | None = None,
        stable_diffusion: str | None = None,
        class_embeddings: str | None = None,
        text_encoder: str | None = None,
        ema: bool = False,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        settings: Mapping[str, Any] | None = None,
        attention_backend: str = "sdpa",
        precision: str | None = None,
        auxiliary_head: Any = None,
        train_cfg: Mapping[str, Any] | None = None,
        test_cfg: Mapping[str, Any] | None = None,
        data_preprocessor: Any = None,
        pretrained: None = None,
        init_cfg: Any = None,
    ) -> None:
        if pretrained is not None:
            raise InputError(f"pretrained must be None, got {brief(pretrained)}: checkpoint= takes weights of VPD")
        if precision is not None and precision not in PRECISIONS:
            raise InputError(f"precision must be None or one of {', '.join(PRECISIONS)}, got {brief(precision)}")
        self.train_cfg, self.test_cfg = train_cfg or {}, test_cfg or {}
        training = self._train_settings
        source = NetworkSource(
            checkpoint=checkpoint, stable_diffusion=stable_diffusion, class_embeddings=class_embeddings,
            text_encoder=text_encoder, ema=ema, num_classes=num_classes, class_names=class_names, settings=settings,
        )  # fmt: skip
        network: Any = source.build()
        base = network.config.base_size
        self._test_settings.grid((base, base), base)
        super().__init__(data_preprocessor=data_preprocessor or _preprocessor(base), init_cfg=init_cfg)
        network.attention_backend = attention_backend
        network.gradient_checkpointing_enable(training.checkpointing)
        self.network = network
        self.precision = precision
        self._fast: SegmentationPerceiver | None = None
        self.num_classes = self.out_channels = network.config.num_classes
        names = default_names(network.config)
        self._dataset_meta = {"classes": names, "palette": palette(len(names)).tolist()}
        self._add_auxiliary_heads(auxiliary_head)
        self.register_state_dict_post_hook(_shorten_names)
        self.register_load_state_dict_pre_hook(_lengthen_names)
        self.train(False)

    def _add_auxiliary_heads(self, config: Any) -> None:
        if config is None:
            return
        configs = config if isinstance(config, (list, tuple)) else [config]
        heads = [_registry.MODELS.build(one) for one in configs]
        self.auxiliary_head = torch.nn.ModuleList(heads) if isinstance(config, (list, tuple)) else heads[0]

    @property
    def _train_settings(self) -> TrainSettings:
        return build(TrainSettings, self.train_cfg, "train_cfg", strict=True)

    @property
    def _test_settings(self) -> TestSettings:
        return build(TestSettings, self.test_cfg, "test_cfg", strict=True)

    @property
    def decode_head(self) -> torch.nn.Module:
        """The network's head."""
        return self.network.decode_head

    @property
    def neck(self) -> torch.nn.Module:
        """The network's neck."""
        return self.network.neck

    @property
    def dataset_meta(self) -> dict[str, Any]:
        """Names and colours of the classes, which mmseg draws with: {"classes": ..., "palette": ...}.

        Those of another number of classes are not taken: MMSegInferencer gives every model without `weights=` those of
        Cityscapes.
        """
        return self._dataset_meta

    @dataset_meta.setter
    def dataset_meta(self, meta: Mapping[str, Any] | None) -> None:
        if meta and len(meta.get("classes") or ()) == self.num_classes:
            self._dataset_meta = {**self._dataset_meta, **{key: value for key, value in meta.items() if value}}

    # The three modes of `forward`, and what mmseg calls besides

    def extract_feat(self, inputs: Tensor) -> list[Tensor]:
        """Return the UNet's features of images (N,3,H,W) in [-1,1], H and W multiples of 64; see `VPD.features`."""
        return self.network.extract_feat(inputs)

    def encode_decode(self, inputs: Tensor, batch_img_metas: Any = None) -> Tensor:
        """Return logits (N,classes,H,W) of images (N,3,H,W) in [-1,1], H and W multiples of 64."""
        return self.network(inputs)

    def _forward(self, inputs: Tensor, data_samples: Any = None) -> Tensor:
        """Return the head's logits (N,classes,H/8,W/8)."""
        return self.network.decode(self.extract_feat(inputs))

    def loss(self, inputs: Tensor, data_samples: Sequence[Any]) -> dict[str, Tensor]:
        """Return the loss of `vpd-fast train` as "decode.loss_ce", the right pixels in percent of those with a class as
        "decode.acc_seg", and what the auxiliary heads return.

        inputs (N,3,H,W) in [-1,1], H and W multiples of 64. data_samples: with `gt_sem_seg`, (1,H,W), 255 is ignored.
        """
        target = torch.stack([sample.gt_sem_seg.data.squeeze(0) for sample in data_samples]).long()
        levels = self.neck(self.extract_feat(inputs))
        logits = self.decode_head(levels).float()
        ignored_in_mean = self._train_settings.ignored_in_mean
        losses = {"decode.loss_ce": segmentation_loss(logits, target, ignored_in_mean=ignored_in_mean)}
        with torch.no_grad():
            valid = target != IGNORED
            correct = (upsample_argmax(logits.detach(), target.shape[1:]) == target) & valid
            losses["decode.acc_seg"] = 100 * correct.sum() / valid.sum().clamp(min=1)
        for prefix, head in self._auxiliary_heads():
            found = head.loss(levels, data_samples, self.train_cfg)
            losses |= {f"{prefix}.{name}": value for name, value in found.items()}
        return losses

    def _auxiliary_heads(self) -> Iterator[tuple[str, Any]]:
        heads = getattr(self, "auxiliary_head", None)
        if isinstance(heads, torch.nn.ModuleList):
            yield from ((f"aux_{i}", head) for i, head in enumerate(heads))
        elif heads is not None:
            yield "aux", heads

    def predict(self, inputs: Tensor, data_samples: Sequence[Any] | None = None) -> list[Any]:
        """Return a SegDataSample for each image, those given if there are some.

        inputs: (N,3,H,W) in [-1,1], any size. `pred_sem_seg` is (1,H,W) int64 and, unless test_cfg.seg_logits is
        False, `seg_logits` (classes,H,W) float32, at the image's `ori_shape` without its padding, flipped back. Labels
        are those of our SegmentationPredictor; where two classes agree to float32 rounding, the largest of seg_logits
        may be the other one. Raises InputError, and ImageError for logits that are not finite.
        """
        samples = [_structures.SegDataSample() for _ in inputs] if data_samples is None else list(data_samples)
        settings, model = self._test_settings, self._predictor()
        found, verdicts = [], []
        with evaluating(model):
            for group, images in _same_padding(inputs, samples):
                grid = settings.grid((images.shape[2], images.shape[3]), model.config.base_size)
                batches = grid.batches(images, batch_size_for(model, settings.batch_size))
                logits, _ = run_batches(model, batches, model.extract_feat, False)
                logits = logits.unflatten(0, (len(group), len(grid)))
                check = FiniteCheck()
                check.see(logits)
                verdicts.append(check.verdict())
                found.append((group, grid, logits))
        if any(verdict.isnan().any() for verdict in verdicts):
            raise ImageError(NOT_FINITE)
        with torch.no_grad():  # out of inference mode, whose tensors could not be changed in place
            for group, grid, logits in found:
                for sample, windows in zip(group, logits, strict=True):
                    _fill(sample, grid, windows, settings.seg_logits)
        return samples

    def _predictor(self) -> SegmentationPerceiver:
        """The plain network, or its fast form."""
        if self.precision is None:
            return self.network
        if self._fast is None:
            fast: Any = optimize(self.network, self.precision)
            self._fast = fast
        assert self._fast is not None
        return self._fast

    def train(self, mode: bool = True) -> VPDSegmentor:
        """Set training or evaluation mode, as torch.nn.Module does; weights may have changed since the last call."""
        self._fast = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> VPDSegmentor:
        self._fast = None
        return super()._apply(*args, **kwargs)


class VPDSeg(VPDSegmentor):
    """`VPDSegmentor` with the arguments of the original repository's class of this name.

    decode_head, neck, unet_config: as there; they may say what VPD's network is, with other num_classes, channels,
        base_size, use_attn, attn_selector and max_attn_size. Channels that follow from these are not looked at.
    sd_path, class_embedding_path: as there, by paths from the working folder; not read with a checkpoint. Without
        class_embedding_path the text encoder embeds the names of 150 classes, which are ADE20K's.
    backbone: not used, as there; mmseg's `_base_` configs have one. options: other arguments of VPDSegmentor.

    Raises InputError and CheckpointError, as that does.
    """

    def __init__(
        self,
        decode_head: Any = None,
        sd_path: str | None = None,
        unet_config: Any = None,
        class_embedding_path: str | None = None,
        neck: Any = None,
        backbone: Any = None,
        checkpoint: str | None = None,
        train_cfg: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        num_classes, settings, training = settings_of(neck, decode_head, unet_config)
        begin = {} if checkpoint else {"stable_diffusion": sd_path, "class_embeddings": class_embedding_path}
        super().__init__(
            checkpoint, num_classes=num_classes, settings={**settings, **dict(options.pop("settings", None) or {})},
            train_cfg={**training, **(train_cfg or {})}, **begin, **options,
        )  # fmt: skip


def _preprocessor(side: int) -> dict[str, Any]:
    """What brings images into [-1, 1], and those of training to the size of the crops."""
    half = [127.5] * 3
    return {
        "type": "mmseg.SegDataPreProcessor", "mean": half, "std": half, "bgr_to_rgb": True, "size": (side, side),
        "pad_val": 0, "seg_pad_val": IGNORED,
    }  # fmt: skip


def _same_padding(inputs: Tensor, samples: Sequence[Any]) -> Iterator[tuple[list[Any], Tensor]]:
    """Yield samples that were padded alike, and their images without the padding."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, sample in enumerate(samples):
        padding = sample.get("img_padding_size", sample.get("padding_size", (0, 0, 0, 0)))
        groups.setdefault(tuple(int(pixels) for pixels in padding), []).append(i)
    height, width = inputs.shape[2:]
    for (left, right, top, bottom), members in groups.items():
        images = inputs[members][:, :, top : height - bottom, left : width - right]
        yield [samples[i] for i in members], images


def _fill(sample: Any, grid: WindowGrid, windows: Tensor, with_logits: bool) -> None:
    """Put into a sample what the windows' logits (windows,classes,h,w) say."""
    size = tuple(sample.get("ori_shape", (grid.y.length, grid.x.length))[:2])
    direction = sample.get("flip_direction") if sample.get("flip") else None
    if direction is not None and direction not in _FLIPS:
        raise InputError(
            f"flip_direction must be {' or '.join(_FLIPS)}, got {brief(direction)}: change the test pipeline's flips"
        )
    labels = grid.labels(windows[None], size)
    if direction is not None:
        labels = labels.flip(_FLIPS[direction])
    sample.set_data({"pred_sem_seg": _PixelData(data=labels)})
    if with_logits:
        sample.set_data({"seg_logits": _PixelData(data=grid.field(windows, size, direction).picture())})


def _shorten_names(segmentor: VPDSegmentor, state_dict: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """Give the network's tensors the names of VPD's checkpoints."""
    for key in [key for key in state_dict if key.startswith(prefix + _NETWORK)]:
        state_dict[prefix + key[len(prefix + _NETWORK) :]] = state_dict.pop(key)


def _lengthen_names(segmentor: VPDSegmentor, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Undo `_shorten_names`, in what is loaded; raise CheckpointError if nothing of it is the network's."""
    segmentor._fast = None
    others = tuple(f"{prefix}{name}." for name, _ in segmentor.named_children())
    known = {prefix + name for name in segmentor.network.state_dict()}
    came = [key for key in state_dict if key.startswith(prefix)]
    if came and not known & set(came):
        raise CheckpointError(
            f"no weight of VPD's segmentation is among the {len(came)} that came, such as {brief(came[0])}: this is a "
            "checkpoint of another task or model; load_from and resume take those of segmentation, and checkpoint= "
            "also what vpd_fast can convert"
        )
    for key in came:
        name = key[len(prefix) :]
        if name.startswith(UNUSED_KEYS):
            del state_dict[key]
        elif not key.startswith(others):
            state_dict[f"{prefix}{_NETWORK}{name}"] = state_dict.pop(key)


def register() -> None:
    """Enter the segmentors into mmseg's registry of models; importing this module has done so.

    Raises InputError where another class has one of their names.
    """
    models = _registry.MODELS
    for segmentor in (VPDSegmentor, VPDSeg):
        other = models.module_dict.get(segmentor.__name__)
        if other is not None and other.__module__ != __name__:
            raise InputError(
                f"{other.__module__}.{segmentor.__name__} has this name in mmseg's registry: import one of the two, or "
                "register the other as another name and use that as type="
            )
        models.register_module(module=segmentor, force=True)


register()
