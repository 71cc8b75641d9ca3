"""Folders of CLIP text encoders, on the disk or from the Hugging Face hub, read as safely as transformers allows."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpd_fast import bundled
from vpd_fast.errors import CheckpointError, MissingDependencyError, brief
from vpd_fast.files import find_weights, read_json_object, read_text, require_regular
from vpd_fast.models.finite import all_finite

if TYPE_CHECKING:
    from torch import nn

_MAX_SIZES = {
    "num_hidden_layers": 100, "hidden_size": 2**14, "intermediate_size": 2**17, "num_attention_heads": 2**10,
    "max_position_embeddings": 2**16, "vocab_size": 2**20,
}  # fmt: skip

WORDS = "words.txt"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
MAX_HASHED = 2**24  # bytes; larger files count by size and time
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index*.json", "pytorch_model*.bin", "pytorch_model.bin.index*.json")


def hub_folder(name: str) -> Path:
    """The snapshot of a hub id: from the local hub cache if complete, else downloaded."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingDependencyError(f"the CLIP text encoder needs `pip install transformers` ({error})") from error
    patterns = ["config.json", "model.safetensors", *_TOKENIZER_FILES]
    reason: Exception | None = None
    for local_only in (True, False):
        try:
            folder = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=local_only))
        except Exception as error:  # the hub's client raises its own, the HTTP client's and the file system's errors
            reason = error
        else:
            if (folder / "model.safetensors").exists() and (folder / "config.json").exists():
                return folder
    raise MissingDependencyError(
        f"the CLIP text encoder {name!r} is neither a local folder nor to be had from the Hugging Face hub; give the "
        f"path of a folder with config.json, model.safetensors, vocab.json and merges.txt (--text-encoder; a "
        f"model may name one that is elsewhere now), or run once with network "
        f"({_first_line(reason)})"
    )


def load_tokenizer(folder: Path) -> Any:
    with _reading(folder):
        from transformers import CLIPTokenizer

        tokenizer = CLIPTokenizer.from_pretrained(str(_subfolders(folder)[1]), local_files_only=True)
        _try_tokenizer(tokenizer)
        return tokenizer


def _try_tokenizer(tokenizer: Any) -> None:
    """Raise what a tokenizer raises that is made of settings but cannot be used; ValueError where tokens do not end."""
    length = 4
    ids = tokenizer(["a", "a a a a"], truncation=True, max_length=length, padding="max_length", return_tensors="pt")
    words = tokenizer("a a", add_special_tokens=False, verbose=False)["input_ids"]
    tokenizer.convert_ids_to_tokens(words)
    ends = (ids["input_ids"] == tokenizer.eos_token_id).any(1)
    if tuple(ids["input_ids"].shape) != (2, length) or not ends.all():
        raise ValueError(f"its tokenizer makes {tuple(ids['input_ids'].shape)} tokens, or they have no end")


def load_model(folder: Path, vocabulary: int) -> nn.Module:
    """The text encoder of a CLIP or diffusers folder, all of it, and large enough for the tokenizer's vocabulary."""
    for part in set(_subfolders(folder)):
        _check_sizes(part)
    with _reading(folder):
        from transformers import CLIPTextModel

        with bundled.unpacked_folder(_subfolders(folder)[0]) as place:
            found = find_weights(place, "model")
            chosen = {"variant": found.variant, "use_safetensors": found.is_safetensors} if found else {}
            loaded: Any = CLIPTextModel.from_pretrained(
                str(place), local_files_only=True, output_loading_info=True, **chosen
            )
    model, info = loaded
    missing = sorted(name for name in info["missing_keys"] if "position_ids" not in name)
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} tensors of a CLIP text encoder, e.g. {missing[0]}")
    spoiled = next((name for name, weight in model.named_parameters() if not all_finite(weight)), None)
    if spoiled is not None:
        raise CheckpointError(f"{folder}: {spoiled} has values that are NaN or infinite; the weights are damaged")
    if vocabulary > model.config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {vocabulary} tokens, the text encoder only {model.config.vocab_size}"
        )
    return model


def _check_sizes(folder: Path) -> None:
    """Raise CheckpointError where something in a folder is no file, or its configuration is that of a giant.

    transformers would wait for the one, and lay out the other before it looks at the weights.
    """
    try:
        for path in folder.iterdir():
            if path.exists():  # in the hub's cache some are links to what was not downloaded
                require_regular(path)
        values = read_json_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no readable CLIP text encoder: {error}") from error
    inner = values.get("text_config")
    for settings in (values, inner if isinstance(inner, dict) else {}):
        for name, most in _MAX_SIZES.items():
            value = settings.get(name, 1)
            if isinstance(value, (int, float)) and not value <= most:
                raise CheckpointError(f"{folder}: {name} is {brief(value)} in config.json; expected at most {most}")


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Errors of transformers as ours, and none of its progress bars and load reports: the vision half of a full CLIP is
    unexpected on purpose, and missing keys raise."""
    try:
        from transformers.utils import logging
    except ImportError as error:
        raise MissingDependencyError(f"the CLIP text encoder needs `pip install transformers` ({error})") from error
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except Exception as error:  # OSError, ValueError, JSON, safetensors and pickle errors: all mean a broken folder
        raise CheckpointError(f"{folder} holds no readable CLIP text encoder: {_first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _subfolders(folder: Path) -> tuple[Path, Path]:
    """The folders of weights and tokenizer in a CLIP or Stable Diffusion folder."""
    weights, tokenizer = (folder / sub if (folder / sub).is_dir() else folder for sub in ("text_encoder", "tokenizer"))
    return weights, tokenizer


def read_words(folder: Path | None) -> tuple[str, ...]:
    """The words that a local encoder was trained on; () where it does not say."""
    path = None if folder is None else _subfolders(folder)[1] / WORDS
    try:
        return tuple(read_text(path).split()) if path is not None and path.is_file() else ()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def fingerprint(folder: Path) -> str:
    """Identity of a local encoder: a hash of its files. Large weights count by size and time; hashing them is slow."""
    weights, words = _subfolders(folder)
    for part in {weights, words}:
        _check_sizes(part)
    digest = hashlib.sha256()
    for path in (weights / "config.json", *(words / name for name in _TOKENIZER_FILES)):
        if path.exists():
            digest.update(f"{path.name}:".encode() + path.read_bytes())
    for path in sorted({p for pattern in _WEIGHT_FILES for p in weights.glob(pattern)}):
        stat = path.stat()
        if stat.st_size <= MAX_HASHED:
            digest.update(f"{path.name}:".encode() + path.read_bytes())
            continue
        digest.update(f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}".encode())
    return f"folder:{digest.hexdigest()}"


def _first_line(error: Exception | None) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
