"""CLIP's text encoder as VPD uses it: one pooled vector per class or scene, one vector per token of a sentence.

Class embeddings are the mean of the pooled outputs over 80 prompt templates, padded to 20 tokens and not normalised,
as VPD's scripts made their files. Sentences give the last hidden state of every token; neither uses an attention
mask, so that padding tokens are ordinary tokens.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vpd_fast import bundled
from vpd_fast.errors import InputError, TruncationWarning, brief
from vpd_fast.files import write_files
from vpd_fast.forks import Lock
from vpd_fast.labels import IMAGENET_TEMPLATES
from vpd_fast.models import encoder_folders
from vpd_fast.models.truncation import Words

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vpd_fast.config import VPDConfig
    from vpd_fast.models.perceiver import Perceiver

DEFAULT_ENCODER = "openai/clip-vit-large-patch14"  # the encoder Stable Diffusion 1.x was trained with
TEMPLATE_TOKENS = 20  # what VPD padded its prompts to; it only cuts off class names longer than about 12 words
SENTENCE_BATCH = 32
_CACHE_HINT = "$VPD_FAST_CACHE names a folder for them"
_FORMAT = "1"  # part of every cache key: change it when the same input should give other numbers


class TextEncoder:
    """A CLIP text encoder that is loaded when first needed and remembers on disk what it computed.

    name_or_path: a Hugging Face id, a local CLIP folder, a Stable Diffusion folder in diffusers' layout (its
    `text_encoder` and `tokenizer` are used; in Stable Diffusion 1.x they are this CLIP), or "shapes-text", the encoder
    of the miniatures that come with the package.
    dtype: what the encoder computes in; None: float32, as VPD did. Results are always float32, on `device`.
    cache_dir: where results are stored; None: `default_cache_dir()`. remember: False stores nothing.
    A hub id stands for its weights in the cache's keys, a local folder for its files (contents of configuration and
    tokenizer, size and time of large weights). Where a folder has words.txt, the encoder was trained on these words
    alone, and texts with others are an InputError.
    """

    def __init__(
        self,
        name_or_path: str | Path = DEFAULT_ENCODER,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        cache_dir: str | Path | None = None,
        remember: bool = True,
    ) -> None:
        self.name = str(name_or_path)
        self.device = torch.device(device)
        self.dtype = torch.float32 if dtype is None else dtype
        self.cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir)
        self.remember = remember
        self._lock = Lock(reentrant=True)
        self._loaded_tokenizer: Any = None
        self._loaded_model: nn.Module | None = None
        self._words_of_texts = Words(self._tokenizer)

    def embed_classes(self, names: Sequence[str], templates: Sequence[str] = IMAGENET_TEMPLATES) -> Tensor:
        """Class or scene names -> (n, C) float32: the mean of the pooled outputs over all templates.

        Underscores in names become spaces ("living_room" is embedded as "living room"). Warns (TruncationWarning) of
        words that the encoder cuts off. Raises InputError for empty or non-string names and for a template without
        "{}", MissingDependencyError if the encoder is unavailable.
        """
        names = [name.replace("_", " ") for name in _texts("names", names)]
        self._check_words(names)
        templates = _texts("templates", templates)
        for template in templates:
            if "{}" not in template:
                raise InputError(f"templates: each needs a {{}} for the class name, got {template!r}")
        for note in self.class_notes(names, templates):
            warnings.warn(note, TruncationWarning, stacklevel=2)

        def embed(batch: list[str]) -> Tensor:
            prompts = [template.replace("{}", name) for name in batch for template in templates]
            ids, hidden = self._encode(prompts, TEMPLATE_TOKENS)
            # CLIP's pooled output: the hidden state at the first end-of-text token (padding is end-of-text as well).
            last = (ids == self._tokenizer().eos_token_id).int().argmax(dim=1)
            pooled = hidden[torch.arange(len(prompts), device=hidden.device), last]
            return pooled.reshape(len(batch), len(templates), -1).mean(dim=1)

        # One class at a time: its numbers then do not depend on which others are asked for with it.
        return self._embed(names, {"kind": "class", "templates": templates, "tokens": TEMPLATE_TOKENS}, 1, embed)

    def embed_sentences(self, sentences: Sequence[str], tokens: int = 40) -> Tensor:
        """Sentences -> (S, tokens, C) float32: last hidden states, padded or cut to `tokens` (RefCOCO 40, G-Ref 77).

        Warns (TruncationWarning) of words that are cut off. Raises InputError for empty or non-string sentences or more
        tokens than the encoder has positions, MissingDependencyError if the encoder is unavailable.
        """
        sentences = _texts("sentences", sentences)
        self._check_words(sentences)
        if not isinstance(tokens, int) or tokens < 2:
            raise InputError(f"tokens must be an int of at least 2 (start and end of the text), got {tokens!r}")

        for note in self.sentence_notes(sentences, tokens):
            warnings.warn(note, TruncationWarning, stacklevel=2)
        settings = {"kind": "sentence", "tokens": tokens}
        return self._embed(sentences, settings, SENTENCE_BATCH, lambda batch: self._encode(batch, tokens)[1])

    def token_names(self, sentence: str, tokens: int = 40) -> list[str]:
        """Names of the `tokens` rows of `embed_sentences`: "<start>", words or parts of words, "<end>", then "<pad>".

        Raises the errors of `embed_sentences`.
        """
        return self._words_of_texts.names(_texts("sentence", [sentence])[0], tokens)

    def word_tokens(self, sentence: str, tokens: int = 40) -> list[tuple[str, range]]:
        """Words of a sentence and the rows of `embed_sentences` that are theirs; without the words that are cut off.

        Raises the errors of `embed_sentences`.
        """
        return self._words_of_texts.rows(_texts("sentence", [sentence])[0], tokens)

    def sentence_notes(self, sentences: Sequence[str], tokens: int = 40) -> list[str]:
        """What `embed_sentences` cuts off: a line for each sentence that has more than `tokens` tokens."""
        return self._words_of_texts.notes_on_sentences(sentences, tokens)

    def class_notes(self, names: Sequence[str], templates: Sequence[str] = IMAGENET_TEMPLATES) -> list[str]:
        """What `embed_classes` cuts off: a line for each name whose end is left out of some of the prompts."""
        names = [name.replace("_", " ") for name in names]
        return self._words_of_texts.notes_on_classes(names, templates, TEMPLATE_TOKENS)

    def _embed(
        self, texts: list[str], settings: dict[str, Any], batch_size: int, embed: Callable[[list[str]], Tensor]
    ) -> Tensor:
        if self.remember and self.cache_dir is None:
            warnings.warn(
                f"text embeddings are not cached: this user has no home directory; {_CACHE_HINT}", stacklevel=3
            )
        paths: dict[str, Path] = {}
        if self.remember and self.cache_dir is not None:
            paths = {text: self._cache_path(self.cache_dir, settings, text) for text in texts}
        cached = {text: _read_cached(path) for text, path in paths.items()}
        results = {text: embedding for text, embedding in cached.items() if embedding is not None}
        missing = [text for text in dict.fromkeys(texts) if text not in results]
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            for text, result in zip(batch, embed(batch).float().cpu(), strict=True):
                results[text] = result
                if text in paths:
                    _write_cached(paths[text], result)
        return torch.stack([results[text] for text in texts]).to(self.device)

    def _ids(self, texts: list[str], tokens: int) -> Tensor:
        """Token ids (n, tokens)."""
        encoded = self._tokenizer()(
            texts, truncation=True, max_length=tokens, padding="max_length", return_tensors="pt"
        )
        return encoded["input_ids"]

    def _encode(self, texts: list[str], tokens: int) -> tuple[Tensor, Tensor]:
        """Token ids (n, tokens) and last hidden states (n, tokens, C)."""
        model = self._model()
        positions = model.config.max_position_embeddings
        if tokens > positions:
            raise InputError(f"tokens must be at most {positions}, what {self.name} has positions for, got {tokens}")
        ids = self._ids(texts, tokens).to(self.device)
        with torch.no_grad():
            return ids, model(input_ids=ids).last_hidden_state

    def _tokenizer(self) -> Any:
        with self._lock:
            if self._loaded_tokenizer is None:
                self._loaded_tokenizer = encoder_folders.load_tokenizer(self._folder())
            return self._loaded_tokenizer

    def _model(self) -> Any:
        with self._lock:
            if self._loaded_model is None:
                model = encoder_folders.load_model(self._folder(), len(self._tokenizer()))
                self._loaded_model = model.to(self.device, self.dtype).eval().requires_grad_(False)
            return self._loaded_model

    def _folder(self) -> Path:
        return self._local_folder() or encoder_folders.hub_folder(self.name)

    def _local_folder(self) -> Path | None:
        if bundled.is_bundled(self.name):
            return bundled.asset(self.name)
        return Path(self.name) if Path(self.name).is_dir() else None

    @functools.cached_property
    def _words(self) -> tuple[str, ...]:
        return encoder_folders.read_words(self._local_folder())

    def _check_words(self, texts: Sequence[str]) -> None:
        """Raise InputError for words that the encoder has never seen, if it says which it has."""
        for text in texts if self._words else ():
            unknown = [word for word in re.findall(r"[^\W\d_]+", text.lower()) if word not in self._words]
            if unknown:
                raise InputError(
                    f"{text!r}: {self.name} does not know {', '.join(unknown)}; its words are {', '.join(self._words)}"
                )

    @functools.cached_property
    def identity(self) -> str:
        """Stands for the encoder in the keys of caches."""
        folder = self._local_folder()
        return f"hub:{self.name}" if folder is None else encoder_folders.fingerprint(folder)

    def _cache_path(self, folder: Path, settings: dict[str, Any], text: str) -> Path:
        content = {"encoder": self.identity, "dtype": str(self.dtype), "format": _FORMAT, "text": text, **settings}
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return folder / "text" / f"{key}.safetensors"


def encoder_name(given: str | None, config: VPDConfig | None = None) -> str:
    """The encoder asked for, else the one that a model was trained with, else the default."""
    return given or (config.text_encoder if config is not None else None) or DEFAULT_ENCODER


def set_classes(model: Perceiver, names: Sequence[str], encoder: TextEncoder) -> None:
    """Give a segmentation or depth model other classes or scenes, in place: embeddings from `encoder`, and the names.

    The number of names is fixed by the model, whose layers are sized by it; build the model with another
    `num_classes` (or `num_scenes`) for another number. Raises InputError when the count or the width does not fit.
    """
    buffer = getattr(model, "class_embeddings", None)
    if buffer is None:
        raise InputError("set_classes needs a segmentation or depth model; a referring model takes sentences instead")
    count, width = buffer.shape
    if len(names) != count:
        raise InputError(f"names: the model has {count} classes and its layers are sized by it, got {len(names)} names")
    embeddings = encoder.embed_classes(names)
    if embeddings.shape[1] != width:
        raise InputError(f"encoder: {encoder.name} gives {embeddings.shape[1]} channels, the model expects {width}")
    with torch.no_grad():
        buffer.copy_(embeddings)
    model.config = model.config.replace(class_names=tuple(names))


def default_cache_dir() -> Path | None:
    """$VPD_FAST_CACHE, or `vpd_fast` in the user's cache folder; for a user without a home None."""
    if os.environ.get("VPD_FAST_CACHE"):
        return Path(os.environ["VPD_FAST_CACHE"])
    if os.name == "nt" and "LOCALAPPDATA" in os.environ:
        return Path(os.environ["LOCALAPPDATA"]) / "vpd_fast" / "cache"
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "vpd_fast"
    try:
        return Path.home() / ".cache" / "vpd_fast"
    except RuntimeError:  # neither $HOME nor an entry in passwd, as in containers with a user of their own
        return None


def _texts(argument: str, texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise InputError(f"{argument} must be a list of strings, got the single string {texts!r}")
    texts = [text.lstrip("\ufeff") if isinstance(text, str) else text for text in texts]  # of a file's first line
    if not texts:
        raise InputError(f"{argument} must not be empty")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{argument} must be non-empty strings, got {brief(text)}")
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise InputError(f"{argument}: {brief(text)} is not UTF-8")
    return texts


def _read_cached(path: Path) -> Tensor | None:
    """The stored embedding, or None if there is none or the file is damaged (it is then written anew)."""
    try:
        embedding = load_file(path)["embedding"]
    except (OSError, SafetensorError, KeyError):
        return None
    return embedding if embedding.dtype == torch.float32 and bool(embedding.isfinite().all()) else None


def _write_cached(path: Path, embedding: Tensor) -> None:
    """Store an embedding; readers and other writers see the whole file or none."""
    try:
        write_files({path: lambda temporary: save_file({"embedding": embedding.contiguous()}, temporary)})
    except (OSError, SafetensorError) as error:
        warnings.warn(
            f"text embeddings are not cached: {path.parent} is not writable ({error}); {_CACHE_HINT}", stacklevel=2
        )
