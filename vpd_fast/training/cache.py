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
    identity: of the network that makes the tensors, see `FrozenEncoder.identity`.
    """

    def __init__(self, folder: str | Path, max_bytes: int, identity: str = "") -> None:
        self.folder, self.max_bytes, self.identity = Path(folder), max_bytes, identity
        self.hits = self.misses = 0
        self.writable = True
        self._bytes = sum(size for _, size, _ in self._files())

    def get(self, key: str) -> Tensor | None:
        """Return the tensor of a key, None if there is none."""
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
            warnings.warn(f"{self.folder}: the cache stops growing ({error.strerror or error})", stacklevel=4)
            return
        self._bytes += path.stat().st_size
        if self._bytes > self.max_bytes:
            self._shrink()

    def _complete(self, contents: Sequence[bytes | np.ndarray], make: Callable[[list[int]], Tensor]) -> Tensor:
        """Return the tensors of `contents`, stacked, on the CPU; `make` computes those at the positions it is given."""
        keys = [_key(self.identity, content) for content in contents]
        tensors = {key: self.get(key) for key in dict.fromkeys(keys)}
        missing = [keys.index(key) for key, tensor in tensors.items() if tensor is None]
        for i, tensor in zip(missing, make(missing) if missing else (), strict=True):
            tensors[keys[i]] = tensor.cpu()
            self.put(keys[i], tensor)
        return torch.stack([tensor for key in keys if (tensor := tensors[key]) is not None])

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key[2:]}.npy"

    def _files(self) -> list[tuple[float, int, Path]]:
        """Return (last use, bytes, path) of every file."""
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
    """Latents by the pixels they were made from. Useful only where images are not augmented at random."""

    def encode(self, images: Tensor, encoder: Callable[[Tensor], Tensor]) -> Tensor:
        """Return encoder(images), computing only those not in the cache; the others are bitwise what they were."""
        pixels = [image.detach().cpu().contiguous().numpy() for image in images]
        return self._complete(pixels, lambda missing: encoder(images[missing])).to(images.device)


class TextCache(TensorCache):
    """Token features (tokens, context_dim) by sentence; the identity is that of the encoder and the token count."""

    def embed(self, sentences: Sequence[str], encoder: Callable[[Sequence[str]], Tensor]) -> Tensor:
        """Return encoder(sentences), (S, tokens, context_dim), computing only new sentences; on the CPU."""
        texts = [sentence.encode() for sentence in sentences]
        return self._complete(texts, lambda missing: encoder([sentences[i] for i in missing]))


def _key(identity: str, content: bytes | np.ndarray) -> str:
    digest = hashlib.blake2b(identity.encode(), digest_size=24)
    if isinstance(content, np.ndarray):
        digest.update(f"{content.dtype} {content.shape}".encode())
    digest.update(content.data if isinstance(content, np.ndarray) else content)
    return digest.hexdigest()


def _save(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:  # given a name, numpy would append ".npy" to it
        np.save(file, array)
