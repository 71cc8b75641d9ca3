"""Cross-attention maps of images that diffusers generates, averaged on the fly.

With P the attention probabilities of the conditional half of a batch,

    maps = mean over UNet calls and layers of resize(mean over heads of P)

Only a sum per resolution is kept, so memory depends neither on the number of steps nor on that of layers, and no
layer's probabilities exist as a whole. Source: the heat maps of DAAM (Tang et al., ACL 2023, equation 6), normalised.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vpd_fast.errors import InputError
from vpd_fast.inference.results import AttentionMaps, save_png
from vpd_fast.inference.windows import WindowAxis, WindowGrid
from vpd_fast.models.truncation import Words
from vpd_fast.ops import cross_attention_maps, cross_attention_maps_into
from vpd_fast.pictures.canvas import heatmap_grid

# Processors that compute softmax(q k^T) v and nothing else, for whose result ours stands.
PLAIN_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")
# What an attention module may have that the UNets of Stable Diffusion 1, 2 and XL do not, and what it is without.
UNUSED = {"norm_q": None, "norm_k": None, "group_norm": None, "spatial_norm": None, "added_kv_proj_dim": None}
UNUSED |= {"residual_connection": False, "rescale_output_factor": 1.0}
PIXELS_PER_LATENT = 8


class GenerationMaps(Sequence[AttentionMaps]):
    """Maps of the images of the last generation: `maps[0]["dog"]` is a heat map (H, W) float32 of the image's size.

    `len(maps)` is the number of images. Each item maps words and tokens, or numbers of tokens where there is no prompt,
    to means of attention probabilities over heads, layers and UNet calls.
    """

    def __init__(
        self, tokenizer: Any = None, words: Sequence[str] | None = None, scale: int = PIXELS_PER_LATENT
    ) -> None:
        self._words = None if tokenizer is None else Words(lambda: tokenizer)
        self._tokens = getattr(tokenizer, "model_max_length", 0)  # pipelines fill prompts up to it
        self._wanted = words
        self._scale = scale
        self._prompts: tuple[str, ...] = ()
        self.reset()

    def reset(self) -> None:
        """Forget what was added until now. A pipeline does so when a generation begins."""
        self.unet_calls = 0
        self._sums: dict[tuple[int, int], Tensor] = {}  # (images, positions, tokens) by height and width
        self._layers = 0
        self._latent_size = (0, 0)

    def begin(self, prompts: Sequence[str], images_per_prompt: int) -> None:
        """Forget what was added until now; the next images are of these prompts, one after the other.

        Raises InputError if one of the wanted words is in none of the prompts.
        """
        self.reset()
        self._prompts = tuple(prompt for prompt in prompts for _ in range(images_per_prompt))
        for word in self._wanted or ():
            if not any(self._tokens_of(word, prompt) for prompt in prompts):
                known = sorted({name for prompt in prompts for name, _ in self._spelled(prompt)})
                raise InputError(f"no prompt has {word!r}; the words are {', '.join(known) or 'none'}")

    def begin_call(self, latent_size: tuple[int, int]) -> None:
        """The UNet begins to denoise latents of this height and width. Raises InputError if others came before."""
        if self._sums and latent_size != self._latent_size:
            raise InputError(
                f"maps of latents of {self._latent_size} are collected, these are {latent_size}: call reset() before"
            )
        self._latent_size = latent_size
        self.unet_calls += 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        """Attention of a layer for these images (B, N, heads * D); adds its maps. Raises InputError for a changed B."""
        size = self._level(q.shape[1])
        first = size not in self._sums
        if first:
            self._sums[size] = q.new_empty((*q.shape[:2], k.shape[1]), dtype=torch.float32)
        sums = self._sums[size]
        if sums.shape != (*q.shape[:2], k.shape[1]):
            raise InputError(
                f"maps of {sums.shape[0]} images and {sums.shape[2]} tokens are collected, "
                f"these are {q.shape[0]} and {k.shape[1]}: call reset() before"
            )
        self._layers += 1
        return cross_attention_maps_into(q, k, v, sums, heads, accumulate=not first)

    def _level(self, positions: int) -> tuple[int, int]:
        """Height and width of a layer: the latents' halved, rounded up, as often as needed."""
        height, width = self._latent_size
        while height * width > positions:
            height, width = -(-height // 2), -(-width // 2)
        if height * width != positions:
            raise InputError(f"latents of {self._latent_size} have no level of {positions} positions in this UNet")
        return height, width

    def __len__(self) -> int:
        return next(iter(self._sums.values())).shape[0] if self._sums else 0

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"there are maps of {len(self)} images, asked for number {i}")
        size = (self._latent_size[0] * self._scale, self._latent_size[1] * self._scale)
        grid = WindowGrid(*(WindowAxis.sliding(n, n, n, multiple=1) for n in size))
        share = len(self._sums) / self._layers  # AttentionMaps takes the mean over its fields
        fields = [
            grid.field(sums[i].T.reshape(1, -1, height, width) * share, size).cpu()
            for (height, width), sums in self._sums.items()
        ]
        if self._words is None or len(self._prompts) != len(self):
            return AttentionMaps(fields)
        prompt = self._prompts[i]
        wanted = [word for word, _ in self._spelled(prompt)] if self._wanted is None else self._wanted
        words = [(word, found) for word in dict.fromkeys(wanted) if (found := self._tokens_of(word, prompt))]
        return AttentionMaps(fields, self._words.names(prompt, fields[0].channels), words)

    def _spelled(self, prompt: str) -> list[tuple[str, range]]:
        """Words of a prompt and their tokens."""
        return [] if self._words is None else self._words.rows(prompt, self._tokens)

    def _tokens_of(self, phrase: str, prompt: str) -> list[int]:
        """Tokens of every place where a word, or several in a row, stand in a prompt."""
        parts = [] if self._words is None else [word for word, _ in self._words.split(phrase)]
        spelled = self._spelled(prompt)
        places = [i for i in range(len(spelled)) if parts and [w for w, _ in spelled[i : i + len(parts)]] == parts]
        return [token for i in places for _, tokens in spelled[i : i + len(parts)] for token in tokens]

    def save(self, folder: str | Path, images: Sequence[Any]) -> list[Path]:
        """Write a picture per image into `folder`, `maps_0.png` and so on: the image and a heat map for each word.

        images: PIL images, or arrays (H, W, 3), uint8 or floats in [0, 1]. Returns the paths.
        Raises InputError if there are not as many images as maps.
        """
        if len(images) != len(self):
            raise InputError(f"there are maps of {len(self)} images, got {len(images)} images")
        Path(folder).mkdir(parents=True, exist_ok=True)
        paths = []
        for i, (image, maps) in enumerate(zip(images, self, strict=True)):
            pixels = np.asarray(image)
            pixels = pixels if pixels.dtype == np.uint8 else (pixels * 255).round().astype(np.uint8)
            keys = list(maps.words) or maps.strongest(8)
            paths.append(save_png(heatmap_grid(pixels, maps, keys), Path(folder, f"maps_{i}.png")))
        return paths


class MapsProcessor:
    """An attention processor of diffusers whose maps are added to `maps`; of the second half of a batch if `guided`."""

    def __init__(self, maps: GenerationMaps, guided: Callable[[], bool]) -> None:
        self.maps = maps
        self.guided = guided

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """What AttnProcessor2_0 returns: hidden_states (B, N, C) after attention to a context (B, L, C')."""
        if attention_mask is not None:
            raise InputError("maps cannot be collected under an attention mask: do not give encoder_attention_mask")
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        if self.guided():
            if q.shape[0] % 2:
                raise InputError(f"under classifier-free guidance a batch has two halves, got one of {q.shape[0]}")
            half = q.shape[0] // 2
            free, _ = cross_attention_maps(q[:half], k[:half], v[:half], attn.heads, need_maps=False)
            out = torch.cat([free, self.maps.attend(q[half:], k[half:], v[half:], attn.heads)])
        else:
            out = self.maps.attend(q, k, v, attn.heads)
        return attn.to_out[1](attn.to_out[0](out.to(hidden_states.dtype)))


@contextmanager
def collect_maps(
    model: Any, words: Sequence[str] | None = None, *, guided: bool | None = None
) -> Iterator[GenerationMaps]:
    """Collect the cross-attention maps of what is generated inside: `with collect_maps(pipeline) as maps:`.

    model: a pipeline of Stable Diffusion 1, 2 or XL (text to image, image to image, inpainting), or its UNet.
    words: of the prompts, each one word or several in a row; None: every word of an image's prompt. A UNet has no
        tokenizer: maps of tokens only.
    guided: whether a batch has an unconditional half, first, whose maps are left out; None: as the pipeline says (for
        a UNet: no).

    Images stay what they are within the rounding of their dtype. Maps are those of the pipeline's last call, or of all
    calls of a bare UNet since `maps.reset()`. At the end the model has its own processors again.
    Raises InputError for other models, for processors that do more than attention, and for words that no prompt has.

        >>> with collect_maps(pipeline, words=["cat", "red hat"]) as maps:
        ...     images = pipeline("a cat with a red hat").images
        >>> maps[0]["red hat"].shape
        (512, 512)
        >>> maps.save("heat", images)
    """
    unet = getattr(model, "unet", model)
    attentions = _cross_attentions(unet)
    tokenizer = None
    if unet is not model:
        tokenizer = getattr(model, "tokenizer", None) or getattr(model, "tokenizer_2", None)
        if guided is None and getattr(model, "do_perturbed_attention_guidance", False):
            raise InputError("a batch of perturbed-attention guidance has more than two parts: its maps are unknown")
    if words is not None and tokenizer is None:
        raise InputError(f"words need a pipeline with a tokenizer, got {type(model).__name__}")
    if isinstance(words, str) or not all(isinstance(word, str) and word.strip() for word in words or ()):
        raise InputError(f"words must be a list of words, got {words!r}")

    def is_guided() -> bool:
        return bool(getattr(model, "do_classifier_free_guidance", False)) if guided is None else guided

    maps = GenerationMaps(tokenizer, words, getattr(model, "vae_scale_factor", PIXELS_PER_LATENT))
    processor = MapsProcessor(maps, is_guided)
    with ExitStack() as stack:
        for attention in attentions:
            stack.callback(attention.set_processor, attention.processor)
            attention.set_processor(processor)
        stack.callback(unet.register_forward_pre_hook(_noting_sizes(maps), with_kwargs=True).remove)
        if tokenizer is not None and hasattr(model, "encode_prompt"):
            model.encode_prompt = _noting_prompts(model.encode_prompt, maps)
            stack.callback(delattr, model, "encode_prompt")
        yield maps


def _noting_sizes(maps: GenerationMaps) -> Callable[..., None]:
    """A hook that tells `maps` the height and width of the latents that the UNet is called with."""

    def noting(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample"]
        maps.begin_call((sample.shape[-2], sample.shape[-1]))

    return noting


def _noting_prompts(encode_prompt: Callable[..., Any], maps: GenerationMaps) -> Callable[..., Any]:
    """The pipeline's method, which also tells `maps` what the next images are of."""
    signature = inspect.signature(encode_prompt)

    def noting(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        prompt = given.get("prompt")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
        maps.begin(prompts, given.get("num_images_per_prompt", 1))
        return encode_prompt(*args, **kwargs)

    return noting


def _cross_attentions(unet: Any) -> list[Any]:
    """The cross-attention modules of a UNet, all of which can be computed by ours. Raises InputError."""
    modules = unet.named_modules() if isinstance(unet, nn.Module) else ()
    found = {name: module for name, module in modules if getattr(module, "is_cross_attention", False)}
    if not found or not hasattr(unet, "attn_processors"):
        raise InputError(
            "maps are collected from pipelines of Stable Diffusion 1, 2 and XL and their UNets, "
            f"{type(unet).__name__} has no cross-attention to a text"
        )
    for name, attention in found.items():
        processor = type(attention.processor).__name__
        if isinstance(attention.processor, MapsProcessor):
            raise InputError("maps of this model are being collected already: leave the other `with` first")
        if processor not in PLAIN_PROCESSORS:
            raise InputError(
                f"{name} has the processor {processor}, which ours would replace: call set_default_attn_processor() "
                "(and unload adapters such as IP-Adapter) before collecting maps"
            )
        unusual = [option for option, without in UNUSED.items() if getattr(attention, option, without) != without]
        if unusual:
            raise InputError(f"{name} has {', '.join(unusual)}, which maps cannot be collected with")
    return list(found.values())
