"""Referring segmentation: masks of what sentences speak of; the image is encoded once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from vpd_fast.errors import ImageError, InputError, brief
from vpd_fast.inference.batching import BatchPredictor, Prepared, stacked
from vpd_fast.inference.finite import NOT_FINITE, FiniteCheck, Transfer
from vpd_fast.inference.results import AttentionMaps, ReferringResult
from vpd_fast.inference.running import (
    batch_size_for,
    evaluating,
    named_encoder,
    run_batches,
    streams_for,
    truncation_notes,
)
from vpd_fast.inference.windows import WindowGrid
from vpd_fast.pictures.resizing import resize_antialiased

if TYPE_CHECKING:
    from torch import Tensor

    from vpd_fast.models.perceiver import ReferringPerceiver


@dataclass(frozen=True)
class Query:
    """What is looked for in an image: token features (S,tokens,context_dim) and the sentences, for the results."""

    tokens: Tensor
    sentences: tuple[str, ...]


@dataclass(kw_only=True)
class ReferringPredictor(BatchPredictor[ReferringResult]):
    """Predictor of referring segmentation: its options, checked, and the call that predicts on one image.

    text: one sentence or several. text_encoder: a vpd_fast.models.text.TextEncoder that embeds them; None: the one that
    the model's configuration names.
    tokens: CLIP token features (S, tokens, context_dim) in place of text_encoder; text then only names the results.
    probabilities: keep the probability of each pixel.
    with_maps: keep the cross-attention maps, by token and by word of each sentence.
    batch_size: sentences per UNet pass, also of several images; default 1 on a CPU, 8 on a GPU.
    streams: batches that a CPU computes at once, each with a share of the threads; default 1, for small fast models up
        to 8.

    notes: what whoever sees the results must know: words of sentences that the text encoder cuts off.

    As in the reference the image is resized to base_size x base_size without keeping its ratio, and the mask is the
    larger of two logits. The reference stops at that size; here the logits are resized bilinearly to the image before
    they are compared.
    """

    model: ReferringPerceiver
    text: str | Sequence[str] | None = None
    text_encoder: Any = None
    tokens: Tensor | None = None
    probabilities: bool = False
    with_maps: bool = False
    batch_size: int | str | None = None
    streams: int | None = None

    def __post_init__(self) -> None:
        self.batch_size = batch_size_for(self.model, self.batch_size)
        self.streams = streams_for(self.model, self.streams)
        self.on_gpu = self.model.device.type == "cuda"
        text = self.text or () if isinstance(self.text, str | None) else self.text
        sentences = tuple(text) if isinstance(text, Iterable) and not isinstance(text, str) else (text,)
        if not all(isinstance(sentence, str) and sentence.strip() for sentence in sentences):
            raise InputError(f"text must be a sentence or a list of sentences, none empty, got {brief(self.text)}")
        given = self.tokens
        self._tokens = self._embed(sentences) if given is None else self._given_tokens(given, sentences)
        self.tokens = self._tokens
        self.sentences = sentences or tuple(f"sentence {i + 1}" for i in range(len(self._tokens)))
        self.notes = truncation_notes(self.text_encoder, sentences=sentences, tokens=self.model.config.tokens)
        self.token_names = self._of_each_sentence("token_names")
        self.word_tokens = self._of_each_sentence("word_tokens")

    def _embed(self, sentences: tuple[str, ...]) -> Tensor:
        if not sentences:
            raise InputError(
                "text is missing: referring segmentation needs a sentence, a list of sentences, or tokens="
            )
        self.text_encoder = self.text_encoder or named_encoder(self.model)
        if self.text_encoder is None:
            raise InputError("text needs text_encoder=, a vpd_fast.models.text.TextEncoder, or give tokens=")
        tokens = self.text_encoder.embed_sentences(list(sentences), tokens=self.model.config.tokens)
        return self._checked(tokens, "text_encoder gave token features")

    def _given_tokens(self, given: Tensor, sentences: tuple[str, ...]) -> Tensor:
        tokens = self._checked(given, "tokens has")
        if sentences and len(sentences) != len(tokens):
            raise InputError(
                f"text has {len(sentences)} sentences, but tokens has {len(tokens)}; expected one row each"
            )
        return tokens

    def _checked(self, tokens: Tensor, what: str) -> Tensor:
        config = self.model.config
        expected = (config.tokens, config.backbone.context_dim)
        dense = isinstance(tokens, torch.Tensor) and tokens.layout == torch.strided and not tokens.is_nested
        came = tuple(tokens.shape) if dense else type(tokens).__name__
        if not dense or tokens.is_meta or tokens.dim() != 3 or came[1:] != expected or not came[0]:
            raise InputError(f"{what} shape {came}; expected (sentences, {expected[0]}, {expected[1]})")
        return tokens.to(self.model.device, self.model.dtype)

    def _of_each_sentence(self, method: str) -> list[tuple[Any, ...]]:
        """Return what the encoder tells of each sentence's tokens if maps are to be named and it can, else ()."""
        tell = getattr(self.text_encoder, method, None)
        if tell is None or not self.with_maps or not self.text:
            return [()] * len(self._tokens)
        return [tuple(tell(sentence, tokens=self.model.config.tokens)) for sentence in self.sentences]

    def query(self, sentences: Sequence[str], tokens: Tensor) -> Query:
        """Return sentences of one image and their token features (S,tokens,context_dim), checked. Raises InputError."""
        return Query(self._given_tokens(tokens, tuple(sentences)), tuple(sentences))

    def prepare(self, image: np.ndarray) -> Prepared:
        """Resize an image (H,W,3)."""
        side = self.model.config.base_size
        return Prepared(image, (resize_antialiased(image, (side, side)),), Query(self._tokens, self.sentences))

    def kind(self, prepared: Prepared) -> Hashable:
        """Return the dtype: images of all sizes are resized to one."""
        return prepared.views[0].dtype

    def forwards(self, prepared: Prepared) -> int:
        """Return the number of sentences."""
        return len(prepared.given.tokens)

    def start(self, group: Sequence[Prepared]) -> Callable[[], list[ReferringResult | ImageError]]:
        """Begin to predict on prepared images of one kind; see `BatchPredictor.start`."""
        model, side, batch, check = self.model, self.model.config.base_size, self.batch_size, FiniteCheck()
        counts = [len(prepared.given.tokens) for prepared in group]
        with evaluating(model):
            images = stacked((prepared.views[0] for prepared in group), model.device) * 2 - 1
            latents = torch.cat([model.encode(part.to(model.dtype)) for part in images.split(batch)])
            owners = torch.arange(len(group)).repeat_interleave(torch.tensor(counts)).split(batch)
            tokens = torch.cat([prepared.given.tokens for prepared in group]).split(batch)

            def forward(pair: tuple[Tensor, Tensor]) -> list[Tensor]:
                return model.features(latents[pair[0].to(latents.device)], model.context(pair[1]))

            logits, levels = run_batches(model, zip(owners, tokens, strict=True), forward, self.with_maps)
            for values in (logits, *levels):
                check.see(values)
            logits = F.interpolate(logits.float(), size=(side, side), mode="bilinear", align_corners=True)
            margins = (logits[:, 1:] - logits[:, :1]).split(counts)
            resized = [self._resized(margin, prepared.size) for margin, prepared in zip(margins, group, strict=True)]
            transfer = Transfer(check.verdict(), *(margin > 0 for margin in resized))
            probabilities = [margin.sigmoid().cpu().numpy() if self.probabilities else None for margin in resized]
            kept = zip(*(level.split(counts) for level in levels), strict=True) if levels else [()] * len(group)
            maps = [self._maps(of_image, prepared.size) for of_image, prepared in zip(kept, group, strict=True)]

        def finish() -> list[ReferringResult | ImageError]:
            verdicts, *masks = transfer.wait()
            finite = [bool((part == 0).all()) for part in np.split(verdicts, np.cumsum(counts)[:-1])]
            return [
                ReferringResult(prepared.image, masks[i], prepared.given.sentences, probabilities[i], maps[i])
                if finite[i]
                else ImageError(NOT_FINITE)
                for i, prepared in enumerate(group)
            ]

        return finish

    @staticmethod
    def _resized(margins: Tensor, size: tuple[int, int]) -> Tensor:
        """Return margins (S,1,side,side), the mask's logit minus the other, at the image's size: (S,H,W)."""
        parts = [F.interpolate(margin[None], size=size, mode="bilinear", align_corners=False) for margin in margins]
        return torch.cat(parts)[:, 0]

    def _maps(self, levels: Sequence[Tensor], size: tuple[int, int]) -> tuple[AttentionMaps, ...] | None:
        if not self.with_maps:
            return None
        side = self.model.config.base_size
        grid = WindowGrid.sliding((side, side), (side, side), (side, side))
        return tuple(
            AttentionMaps([grid.field(level[i : i + 1], size).cpu() for level in levels], names, words)
            for i, (names, words) in enumerate(zip(self.token_names, self.word_tokens, strict=True))
        )
