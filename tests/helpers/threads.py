"""Calls from several threads at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any


def results_of_threads(function: Callable[[Any], Any], arguments: Iterable[Any]) -> list[Any]:
    """Returns [function(x) for x in arguments], each computed in a thread of its own; None where a thread failed."""
    arguments = list(arguments)
    results: list[Any] = [None] * len(arguments)

    def work(i: int) -> None:
        results[i] = function(arguments[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(arguments))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
