"""Models of the structure of VPD's original code, whose names, hooks and checkpointing they have."""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from vpd_fast.models.attention import FeedForward
from vpd_fast.models.depth_head import DepthDecoder, FeatureMerge, last_layer_depth
from vpd_fast.models.referring_head import SimpleDecoding
from vpd_fast.models.segmentation_head import FPN, FPNHead
from vpd_fast.models.unet import Downsample, ResBlock, Upsample, timestep_embedding


class CrossAttention(nn.Module):
    def __init__(self, width, context_width, heads):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))

    def forward(self, x, context=None, mask=None):
        return self.attend(x, context)[0]

    def attend(self, x, context):
        source = x if context is None else context
        q, k, v = (
            linear(t).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for linear, t in ((self.to_q, x), (self.to_k, source), (self.to_v, source))
        )
        probabilities = (q @ k.transpose(2, 3) * self.scale).softmax(-1)
        return self.to_out((probabilities @ v).transpose(1, 2).flatten(2)), probabilities.mean(1)


class TransformerBlock(nn.Module):
    def __init__(self, width, context_width, heads):
        super().__init__()
        self.attn1 = CrossAttention(width, width, heads)
        self.ff = FeedForward(width)
        self.attn2 = CrossAttention(width, context_width, heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.checkpoint = True

    def forward(self, x, context=None):
        if not self.checkpoint:
            return self.run(x, context)
        return checkpoint(self.run, x, context, use_reentrant=True)

    def run(self, x, context):
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context=context) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    def __init__(self, width, context_width, heads):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, context_width, heads)])
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x, context):
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, context=context)
        return x + self.proj_out(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))


class Steps(nn.Sequential):
    def forward(self, x, emb, context):
        for step in self:
            if isinstance(step, ResBlock):
                x = step(x, emb)
            elif isinstance(step, SpatialTransformer):
                x = step(x, context)
            else:
                x = step(x)
        return x


class UNetModel(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.model_channels, self.num_classes = c.model_channels, None
        emb = 4 * c.model_channels
        widths = [c.model_channels * m for m in c.channel_mult]
        self.time_embed = nn.Sequential(nn.Linear(c.model_channels, emb), nn.SiLU(), nn.Linear(emb, emb))

        def block(channels, level):
            attends = 2**level in c.attention_resolutions
            transformer = [SpatialTransformer(widths[level], c.context_dim, c.num_heads)] if attends else []
            return [ResBlock(channels, emb, widths[level]), *transformer]

        downs, skips, width = [Steps(nn.Conv2d(c.in_channels, widths[0], 3, padding=1))], [widths[0]], widths[0]
        for level in range(4):
            for _ in range(c.num_res_blocks):
                downs.append(Steps(*block(width, level)))
                width = widths[level]
                skips.append(width)
            if level < 3:
                downs.append(Steps(Downsample(width)))
                skips.append(width)
        middle = SpatialTransformer(width, c.context_dim, c.num_heads)
        ups = []
        for level in (3, 2, 1, 0):
            for i in range(c.num_res_blocks + 1):
                last = [Upsample(widths[level])] if level and i == c.num_res_blocks else []
                ups.append(Steps(*block(width + skips.pop(), level), *last))
                width = widths[level]
        self.input_blocks = nn.ModuleList(downs)
        self.middle_block = Steps(ResBlock(widths[3], emb, widths[3]), middle, ResBlock(widths[3], emb, widths[3]))
        self.output_blocks = nn.ModuleList(ups)
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, c.in_channels, 3, padding=1))


class DiffusionWrapper(nn.Module):
    def __init__(self, unet):
        super().__init__()
        self.diffusion_model = unet

    def forward(self, x, t, c_concat=None, c_crossattn=None):
        return self.diffusion_model(x, t, context=torch.cat(c_crossattn, 1))


class Store:
    """Keeps maps of up to max_size positions a side."""

    def __init__(self, base_size, max_size):
        self.max_size = base_size // 2 if max_size is None else max_size
        self.attention_store = {}
        self.reset()

    def reset(self):
        self.step_store = {f"{place}_{kind}": [] for place in ("down", "mid", "up") for kind in ("cross", "self")}

    def __call__(self, maps, is_cross, place):
        if maps.shape[1] <= self.max_size**2:
            self.step_store[f"{place}_{'cross' if is_cross else 'self'}"].append(maps)
        return maps


def hook_attention(unet, controller):
    def hooked(self, place_in_unet):
        def forward(x, context=None, mask=None):
            out, maps = self.attend(x, context)
            controller(maps, context is not None, place_in_unet)
            return out

        return forward

    for place, blocks in (("down", unet.input_blocks), ("mid", unet.middle_block), ("up", unet.output_blocks)):
        for module in blocks.modules():
            if isinstance(module, CrossAttention):
                module.forward = hooked(module, place)


def hook_features(unet):
    every = len(unet.output_blocks) // 4

    def forward(x, timesteps=None, context=None):
        emb = unet.time_embed(timestep_embedding(timesteps, unet.model_channels).to(x.dtype))
        skips = []
        for block in unet.input_blocks:
            x = block(x, emb, context)
            skips.append(x)
        x = unet.middle_block(x, emb, context)
        features = []
        for i, block in enumerate(unet.output_blocks):
            x = block(torch.cat([x, skips.pop()], 1), emb, context)
            if i % every == every - 2 and len(features) < 3:
                features.append(x)
        return [*features, x]

    unet.forward = forward


class UNetWrapper(nn.Module):
    def __init__(self, unet, use_attn=True, base_size=512, max_attn_size=None, attn_selector="up_cross+down_cross"):
        super().__init__()
        self.unet = unet
        self.attention_store = Store(base_size // 8, max_attn_size)
        self.size16, self.size32, self.size64 = base_size // 32, base_size // 16, base_size // 8
        self.use_attn = use_attn
        if use_attn:
            hook_attention(unet.diffusion_model, self.attention_store)
        hook_features(unet.diffusion_model)
        self.attn_selector = attn_selector.split("+")

    def forward(self, *args, **kwargs):
        self.attention_store.reset()
        features = self.unet(*args, **kwargs)
        if self.use_attn:
            maps = [m for key in self.attn_selector for m in self.attention_store.step_store[key]]
            for level, side in enumerate((self.size16, self.size32, self.size64), start=1):
                of_level = [m for m in maps if math.isqrt(m.shape[1]) == side]
                if of_level or level < 3:
                    mean = torch.stack(of_level).mean(0).transpose(1, 2).unflatten(2, (side, side))
                    features[level] = torch.cat([features[level], mean], 1)
        return features[::-1]


class KLBlock(nn.Module):
    def __init__(self, channels, width):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, width, eps=1e-6)
        self.dropout = nn.Dropout(0.0)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        if channels != width:
            self.nin_shortcut = nn.Conv2d(channels, width, 1)

    def forward(self, x, temb):
        h = self.norm1(x)
        h = self.norm2(self.conv1(h * h.sigmoid()))
        h = self.conv2(self.dropout(h * h.sigmoid()))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class KLAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2) for conv in (self.q, self.k, self.v))
        probabilities = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(2)
        return x + self.proj_out((v @ probabilities.transpose(1, 2)).view_as(x))


class KLDownsample(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def _holder(**modules):
    holder = nn.Module()
    for name, module in modules.items():
        setattr(holder, name, module)
    return holder


class KLEncoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv_in = nn.Conv2d(3, c.vae_ch, 3, padding=1)
        self.down, before = nn.ModuleList(), c.vae_ch
        for level, multiple in enumerate(c.vae_ch_mult):
            width = c.vae_ch * multiple
            blocks = nn.ModuleList(KLBlock(width if i else before, width) for i in range(c.vae_num_res_blocks))
            self.down.append(_holder(block=blocks, attn=nn.ModuleList()))
            if level < 3:
                self.down[-1].downsample = KLDownsample(width)
            before = width
        self.mid = _holder(block_1=KLBlock(width, width), attn_1=KLAttention(width), block_2=KLBlock(width, width))
        self.norm_out = nn.GroupNorm(32, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, 2 * c.in_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for down in self.down:
            for block in down.block:
                x = block(x, None)
            if hasattr(down, "downsample"):
                x = down.downsample(x)
        x = self.norm_out(self.mid.block_2(self.mid.attn_1(self.mid.block_1(x, None)), None))
        return self.conv_out(x * x.sigmoid())


class AutoencoderKL(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.encoder = KLEncoder(c)
        self.quant_conv = nn.Conv2d(2 * c.in_channels, 2 * c.in_channels, 1)
        self.post_quant_conv = nn.Conv2d(c.in_channels, c.in_channels, 1)

    def encode(self, x):
        mean = self.quant_conv(self.encoder(x)).chunk(2, 1)[0]
        return SimpleNamespace(mode=lambda: mean)

    def train(self, mode=True):
        return super().train(False)  # as the original has it


class TextAdapter(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, texts, gamma):
        return texts + gamma * self.fc(texts)


def _add_backbone(module, config, **wrapper):
    c = config.backbone
    module.encoder_vq = AutoencoderKL(c).requires_grad_(False).eval()
    module.unet = UNetWrapper(DiffusionWrapper(UNetModel(c)), **wrapper)
    module.text_adapter = TextAdapter(c.context_dim)
    module.gamma = nn.Parameter(torch.full((c.context_dim,), 1e-4))


def _features(module, images, context):
    with torch.no_grad():
        latents = module.encoder_vq.encode(images).mode().detach()
    t = torch.ones(len(images), dtype=torch.long, device=images.device)
    return module.unet(latents, t, c_crossattn=[context])


def _wrapper_options(config):
    return {"base_size": config.base_size, "max_attn_size": config.max_attn_size, "attn_selector": config.attn_selector}


class VPDSeg(nn.Module):
    """Has the calls of the original that use the network, which go through one another as there."""

    def __init__(self, config, crop=128, stride=85):
        super().__init__()
        _add_backbone(self, config, **_wrapper_options(config))
        self.register_buffer("class_embeddings", torch.zeros(config.num_classes, config.backbone.context_dim))
        self.neck = FPN(config.feature_channels, config.channels)
        self.decode_head = FPNHead(config.channels, config.num_classes)
        self.crop, self.stride = crop, stride

    def extract_feat(self, img):
        context = self.text_adapter(self.class_embeddings, self.gamma)
        return _features(self, img, context.repeat(len(img), 1, 1))

    def encode_decode(self, img, img_metas):
        logits = self.decode_head(list(self.neck(self.extract_feat(img))))
        return F.interpolate(logits, img.shape[2:], mode="bilinear")

    def forward_dummy(self, img):
        return self.encode_decode(img, None)

    def slide_inference(self, img, img_meta, rescale):
        height, width = img.shape[2:]
        total, count = 0, 0
        for y in range(0, max(height - self.crop + self.stride - 1, 0) // self.stride + 1):
            for x in range(0, max(width - self.crop + self.stride - 1, 0) // self.stride + 1):
                top, left = min(y * self.stride, height - self.crop), min(x * self.stride, width - self.crop)
                logits = self.encode_decode(img[:, :, top : top + self.crop, left : left + self.crop], img_meta)
                margins = (left, width - left - self.crop, top, height - top - self.crop)
                total, count = total + F.pad(logits, margins), count + F.pad(torch.ones_like(logits[:, :1]), margins)
        size = img_meta[0]["ori_shape"][:2] if rescale else (height, width)
        return F.interpolate(total / count, size, mode="bilinear")

    def inference(self, img, img_meta, rescale):
        probabilities = self.slide_inference(img, img_meta, rescale).softmax(1)
        return probabilities.flip(3) if img_meta[0]["flip"] else probabilities

    def aug_test(self, imgs, img_metas, rescale=True):
        total = sum(self.inference(*pair, rescale) for pair in zip(imgs, img_metas, strict=True))
        return list(total.argmax(1).numpy())


class VPDRefer(nn.Module):
    def __init__(self, config):
        super().__init__()
        _add_backbone(self, config, **_wrapper_options(config))
        self.classifier = SimpleDecoding(config.feature_channels)

    def forward(self, img, sentences):
        features = _features(self, img, self.text_adapter(sentences, self.gamma))
        return F.interpolate(self.classifier(features), img.shape[2:], mode="bilinear", align_corners=True)


class DepthEncoder(FeatureMerge):
    def __init__(self, config):
        super().__init__(config.feature_channels)
        _add_backbone(self, config, use_attn=False)
        del self.unet.unet.diffusion_model.out
        self.register_buffer("class_embeddings", torch.zeros(config.num_scenes, config.backbone.context_dim))

    def forward(self, x, class_ids):
        context = self.text_adapter(self.class_embeddings[class_ids.tolist()], self.gamma)
        return self.merge(_features(self, x, context[:, None]))


class VPDDepth(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.encoder, self.max_depth = DepthEncoder(config), config.max_depth
        self.decoder, self.last_layer_depth = DepthDecoder(), last_layer_depth()

    def forward(self, x, class_ids=None):
        height, width = x.shape[2:]
        x = F.pad(x * 2 - 1, (0, -width % 64, 0, -height % 64))
        features = self.encoder(x, class_ids)[:, :, : height // 32, : width // 32]
        return {"pred_d": torch.sigmoid(self.last_layer_depth(self.decoder(features))) * self.max_depth}


MODELS = {"segmentation": VPDSeg, "referring": VPDRefer, "depth": VPDDepth}


def original(case):
    """The model of a golden case, in eval mode."""
    model = MODELS[case.settings["task"]](case.config)
    names = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    model.load_state_dict(case.state_dict(names))
    return model.eval()
