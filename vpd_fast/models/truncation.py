"""Words of a text, the tokens that each has, and which words a limit of tokens cuts off."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from vpd_fast.errors import CheckpointError, MissingDependencyError


class Words:
    """Splits texts into words as a CLIP tokenizer does. load: returns the tokenizer, when first needed."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load
        self.split = functools.lru_cache(maxsize=1024)(self._split)

    def _split(self, text: str) -> tuple[tuple[str, int], ...]:
        """Return the words of a text, as the tokenizer spells them, and how many tokens each has."""
        tokenizer, words, parts = self._load(), [], []
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for number, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
            parts.append(number)
            if token.endswith("</w>"):
                words.append((tokenizer.decode(parts).strip(), len(parts)))
                parts = []
        return tuple(words)

    def rows(self, text: str, tokens: int) -> list[tuple[str, range]]:
        """Return words that have tokens left, and the numbers of these, after the token that begins the text."""
        rows, first = [], 1
        for word, count in self.split(text):
            if first < tokens - 1:
                rows.append((word, range(first, min(first + count, tokens - 1))))
            first += count
        return rows

    def names(self, text: str, tokens: int) -> list[str]:
        """Return a name per token of a text: "<start>", words or parts of words, "<end>", then "<pad>"."""
        tokenizer = self._load()
        ids = tokenizer(text, truncation=True, max_length=tokens, verbose=False)["input_ids"]
        parts = [part.replace("</w>", "") for part in tokenizer.convert_ids_to_tokens(ids[1:-1])]
        return ["<start>", *parts, "<end>", *["<pad>"] * (tokens - len(ids))]

    def notes_on_sentences(self, sentences: Sequence[str], tokens: int) -> list[str]:
        """Return a line for each sentence that has more than `tokens` tokens, with the words that are left out."""
        notes = []
        for sentence in sentences:
            left_out = self._left_out(sentence, tokens - 2)
            if left_out:
                notes.append(
                    f"{sentence!r} has more than the {tokens} tokens that the model takes: {_listed(left_out)} left out"
                )
        return notes

    def notes_on_classes(self, names: Sequence[str], templates: Sequence[str], tokens: int) -> list[str]:
        """Return a line for each class name whose end is left out of some of the prompts of `tokens` tokens."""
        notes = []
        for name in names:
            cut = [words for template in templates if (words := self._left_out_of(template, name, tokens))]
            if cut:  # most words are left out where most stand before the name
                notes.append(
                    f"the class name {name!r} does not fit into the {tokens} tokens of {len(cut)} of "
                    f"{len(templates)} prompts: {_listed(max(cut, key=len))} left out"
                )
        return notes

    def _left_out_of(self, template: str, name: str, tokens: int) -> list[str]:
        """Return the words of a class name that a prompt has no room for."""
        prefix = template[: template.index("{}")]
        before = sum(count for _, count in self.split(prefix)) if self._available else 0
        return self._left_out(name, tokens - 2 - before)

    def _left_out(self, text: str, room: int) -> list[str]:
        """Return the words that are not whole in the first `room` tokens of a text."""
        if len(text.lower().encode()) <= room or not self._available:  # a token is at least one byte
            return []
        words = self.split(text)
        ends = itertools.accumulate(count for _, count in words)
        return [word for (word, _), end in zip(words, ends, strict=True) if end > room]

    @functools.cached_property
    def _available(self) -> bool:
        """Return whether there is a tokenizer: what is cached can be had without one, but not what is cut off."""
        try:
            self._load()
        except (CheckpointError, MissingDependencyError):
            return False
        return True


def _listed(words: Sequence[str]) -> str:
    return ", ".join(map(repr, words))
