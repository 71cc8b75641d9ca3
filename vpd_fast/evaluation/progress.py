"""Progress of an evaluation: a bar on stderr with the metric so far and the time left, or a caller's own function."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vpd_fast.evaluation.results import show

Report = Callable[[int, int, dict[str, float]], None]


@contextmanager
def progress_bar(total: int, metric: str, progress: bool | Report) -> Iterator[Report]:
    """Yield the function to call after each sample: (done, in all, metrics so far).

    progress: False: nothing happens; True: a bar on stderr, if that is a terminal; a function: it is called.
    """
    if not isinstance(progress, bool):
        yield progress
        return
    from rich.console import Console

    console = Console(file=sys.stderr)
    if not progress or not console.is_terminal:
        yield lambda done, total, metrics: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(metric, total=total)
        yield lambda done, _, metrics: bar.update(
            task, completed=done, description=f"{metric} {show(metric, metrics[metric])}"
        )
