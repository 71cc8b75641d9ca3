"""Captions and referring sentences of scenes, in a small vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product, zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from vpd_fast.data.shapes.world import SceneObject

Sentence = tuple[str, int]
CAPTION_WORDS = 20
PER_OBJECT = 4  # sentences
CLEAR = 0.06  # of the image's width: how far left something must be to be called so; nearer and farther: in metres
CLEAR_METRES = 0.4
KINDS = ("attributes", "extremes", "relations")  # of sentences
ATTRIBUTES = ("size", "color", "texture")
RELATIONS = ("left of", "right of", "in front of", "behind")
EXTREMES = dict(zip(("leftmost", "rightmost", "nearest", "farthest"), RELATIONS, strict=True))
_WORDS = """
a an the and thing small large red green blue yellow purple orange cyan white plain striped checkered dotted
sphere cube cylinder cone pyramid ring left right of in front behind leftmost rightmost nearest farthest empty room
"""
VOCABULARY = tuple(_WORDS.split())


def caption_of(things: Sequence[SceneObject], random: np.random.Generator) -> str:
    """Describe the scene from left to right, "a large red sphere and a striped cube", in at most CAPTION_WORDS."""
    phrases: list[str] = []
    words = 0
    for thing in sorted(things, key=lambda thing: thing.column):
        kept = [getattr(thing, name) for name in ATTRIBUTES if name == "color" or random.random() < 0.4]
        named = [*(word for word in kept if word != "plain"), thing.shape]
        phrase = " ".join(["an" if named[0] == "orange" else "a", *named])
        words += len(phrase.split()) + bool(phrases)
        if words > CAPTION_WORDS:
            break
        phrases.append(phrase)
    return " and ".join(phrases) or "an empty room"


def sentences_of(
    named: Sequence[tuple[int, SceneObject]], random: np.random.Generator, size: int
) -> Iterator[Sentence]:
    """Return sentences that fit one of these objects and no other, at most PER_OBJECT for each.

    Kinds take turns (attributes, extremes, relations), or the last, of which there are most, would be nearly all.
    """
    for i, thing in named:
        kinds: dict[str, list[str]] = {kind: [] for kind in KINDS}
        for kind, sentence in _fitting(i, thing, named, size):
            kinds[kind].append(sentence)
        mixed = [[found[k] for k in random.permutation(len(found))] for found in kinds.values()]
        turns = [sentence for turn in zip_longest(*mixed) for sentence in turn if sentence is not None]
        for sentence in turns[:PER_OBJECT]:
            yield sentence, i


def kind_of(sentence: str) -> str:
    """Return which of KINDS a sentence of the world is."""
    if not EXTREMES.keys().isdisjoint(sentence.split()):
        return "extremes"
    return "relations" if any(f" {name} " in sentence for name in RELATIONS) else "attributes"


def relation_holds(name: str, a: SceneObject, b: SceneObject, size: int) -> bool | None:
    """Return whether `a` is left of `b` (right of, ...); None where one could argue."""
    beside = name in ("left of", "right of")
    lead = (b.column - a.column) / size / CLEAR if beside else (b.z - a.z) / CLEAR_METRES
    if name in ("right of", "behind"):
        lead = -lead
    return None if abs(lead) < 1 else lead > 0


def _phrases(thing: SceneObject) -> Iterator[tuple[str, dict[str, str]]]:
    """Return noun phrases that fit, with what they say."""
    for chosen in product((False, True), repeat=len(ATTRIBUTES)):
        said = {name: getattr(thing, name) for name, wanted in zip(ATTRIBUTES, chosen, strict=True) if wanted}
        for noun in (thing.shape, "thing"):
            if noun == "thing" and not said:
                continue
            says = said if noun == "thing" else {**said, "shape": thing.shape}
            yield " ".join([*said.values(), noun]), says


def _fits(thing: SceneObject, says: dict[str, str]) -> bool:
    return all(getattr(thing, name) == word for name, word in says.items())


def _fitting(
    i: int, thing: SceneObject, named: Sequence[tuple[int, SceneObject]], size: int
) -> Iterator[tuple[str, str]]:
    """Return (kind, sentence) of all sentences that single out `thing`."""
    others = [(k, other) for k, other in named if k != i]
    for phrase, says in _phrases(thing):
        alike = [other for _, other in others if _fits(other, says)]
        if not alike:
            yield "attributes", f"the {phrase}"
            continue
        for extreme, relation in EXTREMES.items():
            if all(relation_holds(relation, thing, other, size) for other in alike):
                yield "extremes", f"the {extreme} {phrase}"
        for k, anchor in others:
            around = [other for m, other in named if m not in (i, k) and _fits(other, says)]
            for name, told in _phrases(anchor):
                if sum(_fits(other, told) for _, other in named) != 1:
                    continue
                for relation in RELATIONS:
                    if relation_holds(relation, thing, anchor, size) and all(
                        relation_holds(relation, other, anchor, size) is False for other in around
                    ):
                        yield "relations", f"the {phrase} {relation} the {name}"
