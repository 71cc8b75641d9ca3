"""Damage to files, the same for the same generator of random numbers."""

from __future__ import annotations

import io
import json
import random
import zipfile
from typing import Any

# What takes the place of a value in settings.
VALUES = (
    "x", "", "1", None, True, -1, 0, 1, 2**31, 10**30, 1e300, 1e-300, -0.5, [], {}, [1], [[[[]]]], {"a": {}}, "\ud800",
    "a" * 5000, "../../x",
)  # fmt: skip
TEXTS = ("NaN", "-Infinity", "1e999", "[" * 3000, "9" * 5000, "{", "\ufeff", "\x00")
HOT = 65536  # bytes at the ends of a file, where headers, pickles and lists of entries are


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Return some bytes changed: flipped, cut off, left out, repeated, zeroed, or numbers put to their extremes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = _place(rng, len(changed))
        length = min(rng.choice((1, 2, 4, 8, 100)), len(changed) - at)
        kind = rng.randrange(7)
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at] = rng.randrange(256)
        elif kind == 2:
            del changed[at : at + length]
        elif kind == 3:
            changed[at:at] = changed[at : at + length] * rng.choice((1, 3, 50))
        elif kind == 4:
            changed[at : at + length] = rng.choice((b"\0", b"\xff")) * length
        elif kind == 5:
            other = _place(rng, len(changed))
            changed[at : at + length] = changed[other : other + length]
        else:
            del changed[at + 1 :]
    return bytes(changed)


def _place(rng: random.Random, size: int) -> int:
    if rng.random() < 0.4:
        return rng.randrange(min(HOT, size))
    return size - 1 - rng.randrange(min(HOT, size)) if rng.random() < 0.7 else rng.randrange(size)


def damaged_settings(rng: random.Random, text: str) -> str:
    """Return JSON with values, names or letters changed."""
    kind = rng.randrange(6)
    if kind == 0:
        return damaged(rng, text.encode()).decode("utf-8", "surrogateescape")
    tree = json.loads(text)
    # Of each entry at the top equally often: some of them are long lists.
    top = rng.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
    inner = tree[top] if isinstance(tree[top], (dict, list)) and rng.random() < 0.8 else {}
    parent, key = rng.choice([*_places(inner), (tree, top)])
    if kind == 1 and isinstance(parent, dict):
        parent[rng.choice(("x", "kind", "__class__", f"{key}x"))] = parent.pop(key)
    elif kind == 2:
        del parent[key]
    elif kind == 3:
        parent[key] = "@@"
        return json.dumps(tree).replace('"@@"', rng.choice(TEXTS), 1)
    else:
        value = parent[key]
        near = [value + 1, value * 2, -value, value * 10**9] if type(value) in (int, float) else []
        parent[key] = rng.choice((*VALUES, *near))
    return json.dumps(tree)


def _places(tree: Any) -> Any:
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in pairs:
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from _places(value)


def damaged_text(rng: random.Random, text: str) -> str:
    """Return text with lines repeated, left out or replaced, or with letters changed."""
    lines = text.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    kind = rng.randrange(5)
    if kind == 0:
        return damaged(rng, text.encode()).decode("utf-8", "surrogateescape")
    if kind == 1:
        del lines[at]
    elif kind == 2:
        lines[at] = f"{rng.choice(TEXTS)}\n"
    elif kind == 3:
        name, sign, _ = lines[at].partition(":")
        lines[at] = f"{name}{sign} {rng.choice((*TEXTS, *VALUES))}\n"
    else:
        lines[at:at] = [rng.choice(lines)] * rng.choice((1, 100))
    return "".join(lines)


def damaged_archive(rng: random.Random, data: bytes) -> bytes:
    """Return a file of torch.save with a changed pickle, whose check sum fits again."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(target, "w") as archive:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("/data.pkl"):
                content = damaged(rng, content)
            archive.writestr(zipfile.ZipInfo(entry.filename), content)
    return target.getvalue()
