"""What frozen networks return, kept on disk: latents of images, features of sentences."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vpd_fast.files import write_files

SHRINK_TO = 0.9  # of the bound, when it is exceeded


class TensorCache:
    """float32 tensors by a hash of what they were made from, one file each; the least recently used go first.

    Several processes may use a folder. A file that cannot be read counts as missing. When the disk is full the cache
    stops writing, with one warning.
    max_bytes: of all files together; exceeded by what other processes write between two looks at the folder.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = Path(folder), max_bytes
        self.hits = self.misses = 0
        self.writable = True
        self._bytes = sum(size for _, size, _ in self._files())

    def get(self, key: str) -> Tensor | None:
        """The tensor of a key, None if there is none."""
        path = self._path(key)
        try:
            found = torch.from_numpy(np.load(path, allow_pickle=False))
            os.utime(path)  # used now
        except FileNotFoundError:
            found = None
        except (OSError, ValueError, EOFError, TypeError):
            path.unlink(missing_ok=True)
            found = None
        self.hits, self.misses = self.hits + (found is not None), self.misses + (found is None)
        return found

    def put(self, key: str, tensor: Tensor) -> None:
        """Keep a tensor, if there is room on the disk."""
        if not self.writable:
            return
        path, array = self._path(key), tensor.detach().cpu().contiguous().numpy()
        try:
            write_files({path: lambda temporary: _save(temporary, array)})
        except OSError as error:
            self.writable = False
            warnings.warn(f"{self.folder}: the cache stops growing ({error.strerror or error})", stacklevel=3)
            return
        self._bytes += path.stat().st_size
        if self._bytes > self.max_bytes:
            self._shrink()

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key[2:]}.npy"

    def _files(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, path) of every file."""
        files = []
        for path in self.folder.glob("??/*.npy"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process took it away
                continue
            files.append((status.st_mtime, status.st_size, path))
        return files

    def _shrink(self) -> None:
        files = sorted(self._files())
        self._bytes = sum(size for _, size, _ in files)
        for _, size, path in files:
            if self._bytes <= SHRINK_TO * self.max_bytes:
                break
            path.unlink(missing_ok=True)
            self._bytes -= size


class LatentCache(TensorCache):
    """Latents by the pixels they were made from. Useful only where images are not augmented at random.

    identity: of the encoder, see `FrozenEncoder.identity`.
    """

    def __init__(self, folder: str | Path, max_bytes: int, identity: str) -> None:
        super().__init__(folder, max_bytes)
        self.identity = identity

    def encode(self, images: Tensor, encoder: Callable[[Tensor], Tensor]) -> Tensor:
        """encoder(images), of which only those not in the cache are computed; the others are bitwise what they were."""
        keys = [_key(self.identity, image.detach().cpu().contiguous().numpy()) for image in images]
        latents = [self.get(key) for key in keys]
        missing = [i for i, found in enumerate(latents) if found is None]
        if missing:
            for i, made in zip(missing, encoder(images[missing]), strict=True):
                latents[i] = made.cpu()
                self.put(keys[i], made)
        return torch.stack(latents).to(images.device)


class TextCache(TensorCache):
    """Token features (tokens, context_dim) by sentence.

    identity: of the text encoder and of the number of tokens.
    """

    def __init__(self, folder: str | Path, max_bytes: int, identity: str) -> None:
        super().__init__(folder, max_bytes)
        self.identity = identity

    def embed(self, sentences: Sequence[str], encoder: Callable[[Sequence[str]], Tensor]) -> Tensor:
        """encoder(sentences), (S, tokens, context_dim), of which only new sentences are computed."""
        keys = [_key(self.identity, sentence.encode()) for sentence in sentences]
        features = {key: self.get(key) for key in dict.fromkeys(keys)}
        missing = {key: text for key, text in zip(keys, sentences, strict=True) if features[key] is None}
        device = torch.device("cpu")
        if missing:
            made = encoder(list(missing.values()))
            device = made.device
            for key, row in zip(missing, made, strict=True):
                features[key] = row.cpu()
                self.put(key, row)
        return torch.stack([features[key] for key in keys]).to(device)


def _key(identity: str, content: bytes | np.ndarray) -> str:
    digest = hashlib.blake2b(identity.encode(), digest_size=24)
    if isinstance(content, np.ndarray):
        digest.update(f"{content.dtype} {content.shape}".encode())
    digest.update(content)
    return digest.hexdigest()


def _save(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:  # given a name, numpy would append ".npy" to it
        np.save(file, array)
