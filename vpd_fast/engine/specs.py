"""The layers a fast model has, as a list: where each one's weight comes from, and which rewrites made it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vpd_fast.config import LATENT_STRIDE
from vpd_fast.engine import rewrites
from vpd_fast.models.attention import GEGLU, BasicTransformerBlock
from vpd_fast.models.autoencoder import AttnBlock, Encoder, ResnetBlock
from vpd_fast.models.segmentation_head import ConvModule
from vpd_fast.models.unet import Downsample, ResBlock, SpatialTransformer, UNet, Upsample
from vpd_fast.models.vpd import VPD, VPDDepth, VPDReferring, VPDSegmentation

Weight = tuple[Tensor, "Tensor | None"]


@dataclass(frozen=True)
class Spec:
    """One layer before it is rounded and packed.

    make: returns weight and bias in the model's dtype: (n,k) of a "linear" layer, (n,c,h,w) of a "conv", (c,) of a
        "group_norm". It is called when the layer is built, so that one layer at a time is in memory twice.
    side: height of a convolution's output at the model's image size. settings: of the layer (vpd_fast.engine.layers).
    static_rows: what makes the layer's input is always the same and can round it.
    """

    name: str
    kind: str
    make: Callable[[], Weight]
    settings: dict[str, Any] = field(default_factory=dict)
    rewrites: tuple[str, ...] = ()
    side: int = 0
    upsample: bool = False
    static_rows: bool = False


def _parameters(module: nn.Module) -> Weight:
    return module.get_parameter("weight"), None if module.bias is None else module.get_parameter("bias")


def _matrix(conv: nn.Module) -> Weight:
    weight, bias = _parameters(conv)
    return weight[:, :, 0, 0], bias


def _norm(name: str, norm: nn.Module) -> Spec:
    assert isinstance(norm, nn.GroupNorm)
    settings = {"groups": norm.num_groups, "eps": norm.eps}
    return Spec(name, "group_norm", partial(_parameters, norm), settings)


def _conv(name: str, conv: nn.Module, side: int, make: Callable[[], Weight] | None = None, **options: Any) -> Spec:
    """A convolution with its own kernel size, stride and padding."""
    assert isinstance(conv, nn.Conv2d)
    assert not isinstance(conv.padding, str)
    pad_y, pad_x = conv.padding
    settings = {"stride": conv.stride[0], "padding": (pad_y, pad_x, pad_y, pad_x)} | options.pop("settings", {})
    return Spec(name, "conv", make or partial(_parameters, conv), settings, side=side, **options)


def layer_specs(model: VPD) -> Iterator[Spec]:
    """All layers of the fast form of `model`, in the order in which they run."""
    backbone, config = model.backbone, model.config
    autoencoder = backbone.encoder_vq
    yield from _encoder(autoencoder.encoder, config.base_size)
    conv, applied = autoencoder.encoder.conv_out, ("latent mean", "dead outputs")
    fold = partial(rewrites.fold_latent_mean, conv, autoencoder.quant_conv, config.latent_scale)
    # Side 0: a few channels of output are too little for Winograd.
    yield _conv("encoder.conv_out", conv, 0, fold, settings={"silu": True}, rewrites=applied)
    yield from _unet(backbone.unet.unet.diffusion_model, config.base_size // LATENT_STRIDE, config.context_tokens)
    yield from _HEADS[config.task](model)


def _encoder(encoder: Encoder, side: int) -> Iterator[Spec]:
    yield _conv("encoder.conv_in", encoder.conv_in, side)
    for i, down in enumerate(encoder.down):
        for j, block in enumerate(down.block):
            yield from _kl_block(f"encoder.down.{i}.{j}", block, side)
        if down.downsample is not None:
            side //= 2
            conv, settings = down.downsample.conv, {"padding": (0, 0, 1, 1)}
            yield _conv(f"encoder.down.{i}.downsample", conv, side, settings=settings, rewrites=("padding",))
    yield from _kl_block("encoder.mid.block_1", encoder.mid.block_1, side)
    yield from _kl_attention("encoder.mid.attn", encoder.mid.attn_1)
    yield from _kl_block("encoder.mid.block_2", encoder.mid.block_2, side)
    yield _norm("encoder.norm_out", encoder.norm_out)


def _block(
    name: str, norms: tuple, convs: tuple, side: int, first: Callable[[], Weight] | None = None
) -> Iterator[Spec]:
    """Two times group norm, SiLU and convolution."""
    for i, (norm, conv) in enumerate(zip(norms, convs, strict=True), start=1):
        yield _norm(f"{name}.norm{i}", norm)
        make, applied = (first, ("time",)) if i == 1 and first else (None, ())
        yield _conv(f"{name}.conv{i}", conv, side, make, settings={"silu": True}, rewrites=applied)


def _kl_block(name: str, block: ResnetBlock, side: int) -> Iterator[Spec]:
    if hasattr(block, "nin_shortcut"):
        yield Spec(f"{name}.shortcut", "linear", partial(_matrix, block.nin_shortcut))
    yield from _block(name, (block.norm1, block.norm2), (block.conv1, block.conv2), side)


def _kl_attention(name: str, block: AttnBlock) -> Iterator[Spec]:
    def merged(side: int) -> Weight:
        return rewrites.merge_one_head_attention(block.q, block.k, block.v, block.proj_out)[side]

    yield _norm(f"{name}.norm", block.norm)
    yield Spec(f"{name}.before", "linear", partial(merged, 0), rewrites=("one-head attention",))
    yield Spec(f"{name}.after", "linear", partial(merged, 1), rewrites=("one-head attention",))


def _unet(unet: UNet, side: int, tokens: int) -> Iterator[Spec]:
    with torch.no_grad():
        embedding = rewrites.time_embedding(unet)
    for place, block in unet.blocks():
        for i, layer in enumerate(block):
            name, size = f"unet.{place.name}.{i}", side >> place.level
            if isinstance(layer, ResBlock):
                yield from _res_block(name, layer, embedding, size)
            elif isinstance(layer, SpatialTransformer):
                yield from _transformer(name, layer, tokens)
            elif isinstance(layer, Upsample):
                yield _conv(name, layer.conv, 2 * size, upsample=True, rewrites=("upsampling",))
            elif isinstance(layer, Downsample):
                yield _conv(name, layer.op, size)
            else:
                yield _conv("unet.conv_in", layer, size)


def _res_block(name: str, block: ResBlock, embedding: Tensor, side: int) -> Iterator[Spec]:
    if isinstance(block.skip_connection, nn.Conv2d):
        yield Spec(f"{name}.shortcut", "linear", partial(_matrix, block.skip_connection), rewrites=("concatenation",))

    def first() -> Weight:
        conv = block.in_layers[2]
        return conv.get_parameter("weight"), rewrites.fold_time(conv.get_parameter("bias"), block.emb_layers, embedding)

    norms, convs = (block.in_layers[0], block.out_layers[0]), (block.in_layers[2], block.out_layers[3])
    yield from _block(name, norms, convs, side, first)


def _transformer(name: str, transformer: SpatialTransformer, tokens: int) -> Iterator[Spec]:
    (block,) = transformer.transformer_blocks
    yield _norm(f"{name}.norm", transformer.norm)
    yield Spec(f"{name}.proj_in", "linear", partial(_matrix, transformer.proj_in))
    yield from _attention(name, block, tokens)

    gate, _, out = block.ff.net
    assert isinstance(gate, GEGLU)
    assert isinstance(out, nn.Linear)

    def ff1() -> Weight:
        from vpd_fast.ops import geglu_rows

        weight, bias = rewrites.fold_layer_norm(*_parameters(gate.proj), block.norm3)
        order = geglu_rows(weight.shape[0] // 2)
        return weight[order], bias[order]

    settings = {"norm": "layer", "eps": block.norm3.eps, "activation": "geglu"}
    yield Spec(f"{name}.ff1", "linear", ff1, settings, ("layer norm",))
    ff2 = partial(rewrites.merge_feed_forward, out, transformer.proj_out)
    yield Spec(f"{name}.ff2", "linear", ff2, rewrites=("feed-forward", "concatenation"), static_rows=True)


def _attention(name: str, block: BasicTransformerBlock, tokens: int) -> Iterator[Spec]:
    def qkv() -> Weight:
        weights = [block.attn1.to_q.weight, block.attn1.to_k.weight, block.attn1.to_v.weight]
        return rewrites.fold_layer_norm(torch.cat(weights), None, block.norm1)

    def kv() -> Weight:
        return torch.cat([block.attn2.to_k.weight, block.attn2.to_v.weight]), None

    yield Spec(f"{name}.attn1.qkv", "linear", qkv, {"norm": "layer", "eps": block.norm1.eps}, ("qkv", "layer norm"))
    yield Spec(f"{name}.attn1.out", "linear", partial(_parameters, block.attn1.to_out[0]), static_rows=True)
    if tokens == 1:
        values = partial(_parameters, block.attn2.to_v)
        yield Spec(f"{name}.attn2.v", "linear", values, rewrites=("one token",))
    else:
        q = partial(rewrites.fold_layer_norm, block.attn2.to_q.weight, None, block.norm2)
        yield Spec(f"{name}.attn2.kv", "linear", kv, rewrites=("text",))
        yield Spec(f"{name}.attn2.q", "linear", q, {"norm": "layer", "eps": block.norm2.eps}, ("layer norm",))
    out = partial(_parameters, block.attn2.to_out[0])
    yield Spec(f"{name}.attn2.out", "linear", out, static_rows=tokens > 1)  # one token: runs once per text


def _bn_conv(name: str, conv: nn.Module, bn: nn.Module, side: int) -> Spec:
    """Convolution, batch norm, ReLU."""
    assert isinstance(bn, nn.BatchNorm2d)
    make = partial(rewrites.fold_batch_norm, *_parameters(conv), bn)
    return _conv(name, conv, side, make, settings={"activation": "relu"}, rewrites=("batch norm",))


def _segmentation_head(model: VPDSegmentation) -> Iterator[Spec]:
    side = model.config.base_size // LATENT_STRIDE
    for i, conv in enumerate(model.neck.lateral_convs):
        yield Spec(f"head.lateral.{i}", "linear", partial(_matrix, conv.conv))
    for i, conv in enumerate(model.neck.fpn_convs):
        yield _conv(f"head.fpn.{i}", conv.conv, side >> i)
    for level, layers in enumerate(model.decode_head.scale_heads):
        for i, module in enumerate(m for m in layers if isinstance(m, ConvModule)):
            yield _bn_conv(f"head.scale.{level}.{i}", module.conv, module.bn, side >> max(level - i, 0))
    yield Spec("head.conv_seg", "linear", partial(_matrix, model.decode_head.conv_seg))


def _referring_head(model: VPDReferring) -> Iterator[Spec]:
    side, head = model.config.base_size // LATENT_STRIDE, model.classifier
    for stage in (4, 3, 2):
        for i in (1, 2):
            conv, bn = getattr(head, f"conv{i}_{stage}"), getattr(head, f"bn{i}_{stage}")
            yield _bn_conv(f"head.conv{i}_{stage}", conv, bn, side >> (stage - 2))
    yield Spec("head.conv1_1", "linear", partial(_matrix, head.conv1_1))


def _depth_head(model: VPDDepth) -> Iterator[Spec]:
    merge, side = model.encoder, model.config.base_size // LATENT_STRIDE
    yield _conv("head.layer1.0", merge.layer1[0], side // 2)
    yield _norm("head.layer1.norm", merge.layer1[1])
    yield _conv("head.layer1.1", merge.layer1[3], side // 4)
    yield _conv("head.layer2", merge.layer2[0], side // 4)
    yield Spec("head.out_layer", "linear", partial(_matrix, merge.out_layer[0]))
    yield _norm("head.out_layer.norm", merge.out_layer[1])
    deconvs = model.decoder.deconv_layers
    for i in range(0, len(deconvs), 3):
        make = partial(_deconvolution, deconvs[i], deconvs[i + 1])
        yield Spec(f"head.deconv.{i // 3}", "linear", make, {"activation": "relu"}, ("batch norm",))
    conv, bn, _ = model.decoder.conv_layers
    yield _bn_conv("head.conv", conv, bn, model.config.base_size // 4)
    first, _, last = model.last_layer_depth
    yield _conv("head.last.0", first, model.config.base_size, settings={"activation": "relu"})
    yield _conv("head.last.1", last, 0)


def _deconvolution(deconv: nn.Module, bn: nn.Module) -> Weight:
    assert isinstance(bn, nn.BatchNorm2d)
    weight, bias = _parameters(deconv)
    weight, bias = rewrites.fold_batch_norm(weight.transpose(0, 1), bias, bn)
    return rewrites.deconvolution_as_linear(weight.transpose(0, 1), bias)


_HEADS: dict[str, Callable[[Any], Iterator[Spec]]] = {
    "segmentation": _segmentation_head,
    "referring": _referring_head,
    "depth": _depth_head,
}
