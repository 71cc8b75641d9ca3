"""Pillow's limits and warnings, which are variables of its modules, while this package reads an image."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from PIL import Image, PngImagePlugin

from vpd_fast.forks import Lock, call_in_children

MAX_PIXELS = 2**28  # 16384 x 16384; Pillow's own limit would refuse at 179 and warn at 89 million pixels
MAX_METADATA = 2**27  # bytes of unpacked text and colour profiles of a PNG; Pillow's own limit is 1 MiB a chunk

_LIMITS: dict[tuple[Any, str], Any] = {
    (Image, "MAX_IMAGE_PIXELS"): MAX_PIXELS,
    (PngImagePlugin, "MAX_TEXT_CHUNK"): MAX_METADATA,
    (PngImagePlugin, "MAX_TEXT_MEMORY"): MAX_METADATA,
}
_QUIET = r"PIL\.(?#while vpd_fast reads)"  # whether an image can be read is told by an error, so warnings are noise


class _InForce:
    """Counts the threads that read: the first one sets the limits, the last one puts back what was there."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.readers = 0
        self.before: dict[tuple[Any, str], Any] = {}
        self.filters: Any = []

    def enter(self) -> None:
        with self.lock:
            self.readers += 1
            if not self.before:
                self.before = {key: getattr(*key) for key in _LIMITS}
                for (module, name), value in _LIMITS.items():
                    setattr(module, name, value)
                warnings.filterwarnings("ignore", module=_QUIET)
                self.filters = warnings.filters  # the caller may leave a `catch_warnings` in between

    def leave(self) -> None:
        with self.lock:
            self.readers -= 1
            if not self.readers:
                self.restore()

    def restore(self) -> None:
        for (module, name), value in self.before.items():
            setattr(module, name, value)
        current: Any = warnings.filters
        for filters in (self.filters, current):
            added = [entry for entry in filters if getattr(entry[3], "pattern", None) == _QUIET]
            for entry in added:
                with suppress(ValueError):
                    filters.remove(entry)
        self.before = {}

    def forget(self) -> None:
        """Put everything back in a forked child, where no other thread reads."""
        self.readers = 0
        self.restore()


_in_force = _InForce()
call_in_children(_in_force.forget)


@contextmanager
def pillow_limits() -> Iterator[None]:
    """Set our limits for pixels and metadata and silence Pillow's warnings, for all threads while one of them reads."""
    _in_force.enter()
    try:
        yield
    finally:
        _in_force.leave()
