"""What a measurement run is made of. Imports nothing large: the process that keeps account reads it, too."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One measurement of an item, which is kept as soon as it is done and not repeated by a later run.

    name: unique within the item. run: computes its rows. seconds: after which it counts as hanging, and its process is
    ended.
    """

    name: str
    run: Callable[[], Row | list[Row]]
    seconds: float = 30.0


@dataclass(frozen=True)
class Item:
    """Steps that answer one question.

    decides: the question. seconds: the most that the item may take. steps: "module:function" that makes the steps from
    the setting, the most valuable first; imported in the process that measures.
    """

    name: str
    decides: str
    seconds: float
    steps: str


@dataclass(frozen=True)
class Plan:
    """A whole run. setting: "module:function" that makes what steps share from the options of the command line."""

    items: tuple[Item, ...]
    setting: str

    def make_setting(self, options: dict[str, Any]) -> Any:
        """Return what the steps of this process share."""
        return resolve(self.setting)(options)


Steps = Iterable[Step]


def resolve(path: str) -> Callable[..., Any]:
    """Return the function of "module:function"."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
