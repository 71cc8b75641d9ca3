"""The tokenizer of the shapes world, and the texts that its pre-training sees."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from vpd_fast.data.shapes import CLASSES, VOCABULARY, Scene
from vpd_fast.files import write_files
from vpd_fast.labels import IMAGENET_TEMPLATES
from vpd_fast.models.encoder_folders import WORDS

START, END = "<|startoftext|>", "<|endoftext|>"
_MIRRORED = {"left": "right", "right": "left", "leftmost": "rightmost", "rightmost": "leftmost"}
_SHARES = {"empty": 0.1, "caption": 0.5, "template": 0.2, "sentence": 0.2}  # of the texts


def known_words() -> list[str]:
    """What gets a token of its own: the world's words, and those of the templates class names are put into; the text
    encoder must know these to look past them."""
    text = " ".join(template.replace("{}", " ") for template in IMAGENET_TEMPLATES).lower()
    words = "".join(c if c.isalpha() else " " for c in text).split()
    return sorted({*VOCABULARY, *CLASSES, *(word for word in words if len(word) > 1)})


def merge_rules(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, in order, that make one token of every word: the usual training, gone on with to the end."""
    spelled = [[*word[:-1], f"{word[-1]}</w>"] for word in sorted(set(words))]
    rules = []
    while True:
        pairs = Counter(pair for pieces in spelled for pair in zip(pieces, pieces[1:], strict=False))
        if not pairs:
            return rules
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        rules.append(best)
        for pieces in spelled:
            i = 0
            while i + 1 < len(pieces):
                if (pieces[i], pieces[i + 1]) == best:
                    pieces[i : i + 2] = ["".join(best)]
                i += 1


def _characters() -> list[str]:
    """What stands for the 256 bytes in CLIP's vocabulary (as in GPT-2's): printable characters for themselves, the
    others moved up."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) for byte in visible] + [chr(256 + i) for i in range(len(hidden))]


def write_tokenizer(folder: Path, words: Iterable[str], length: int) -> dict[str, int]:
    """The files of a CLIPTokenizer that has a token for every word and spells others with parts; its vocabulary."""
    rules = merge_rules(words)
    characters = _characters()
    tokens = [*characters, *(f"{c}</w>" for c in characters), *("".join(rule) for rule in rules), START, END]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    merges = "\n".join(["#version: 0.2", *(" ".join(rule) for rule in rules)]) + "\n"
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length}
    settings |= {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    texts = {"vocab.json": json.dumps(vocabulary), "merges.txt": merges, "tokenizer_config.json": json.dumps(settings)}
    texts[WORDS] = "\n".join(dict.fromkeys((*VOCABULARY, *CLASSES))) + "\n"
    write_files(
        {folder / name: lambda path, text=text: path.write_text(text, encoding="utf-8") for name, text in texts.items()}
    )
    return vocabulary


def mirrored(text: str) -> str:
    """A caption or sentence that fits the picture seen in a mirror; captions go from left to right."""
    text = " and ".join(reversed(text.split(" and ")))
    return " ".join(_MIRRORED.get(word, word) for word in text.split(" "))


def training_text(scene: Scene, mirror: bool, random: np.random.Generator) -> str:
    """A text to draw this scene from: its caption, a sentence about it, an object in a template, or nothing."""
    kind = str(random.choice(list(_SHARES), p=list(_SHARES.values())))
    if kind == "empty":
        return ""
    text = scene.caption
    if kind == "template" and scene.objects:
        thing = max(scene.objects, key=lambda o: o.visible * random.random())
        named = (thing.shape, f"{thing.color} {thing.shape}", "floor", "wall")[random.choice(4, p=[0.5, 0.3, 0.1, 0.1])]
        return str(random.choice(IMAGENET_TEMPLATES)).replace("{}", named)
    if kind == "sentence" and scene.sentences:
        text = scene.sentences[random.integers(len(scene.sentences))][0]
    return mirrored(text) if mirror else text
