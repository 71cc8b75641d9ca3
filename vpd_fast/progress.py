"""The one progress bar: on stderr where that is a terminal, with the count, the time gone and the time left."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def error_console() -> Console:
    """A rich console on stderr."""
    from rich.console import Console

    return Console(file=sys.stderr)


class ProgressBar:
    """A bar up to `total` (None: unknown), beginning at `completed`, with a description that may change.

    visible: whether it is drawn; None: on a terminal. A bar that is not drawn loads nothing and does nothing. Use it in
    a `with` statement, or call `close`.
    """

    def __init__(
        self, total: int | None, description: str = "", *, completed: int = 0, visible: bool | None = None
    ) -> None:
        self.visible = sys.stderr.isatty() if visible is None else visible
        if not self.visible:
            return
        from rich import progress

        columns = (
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.description}", markup=False),
        )
        self._bar = progress.Progress(*columns, console=error_console())
        self._task = self._bar.add_task(description, total=total, completed=completed)
        self._bar.start()

    def update(
        self,
        completed: int | None = None,
        description: str | None = None,
        *,
        advance: int | None = None,
        total: int | None = None,
    ) -> None:
        """Move the bar to `completed`, or on by `advance`, and change its description or where it ends."""
        if self.visible:
            self._bar.update(self._task, completed=completed, description=description, advance=advance, total=total)

    def message(self, text: str) -> None:
        """Print a line on stderr, above the bar where there is one."""
        if self.visible:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Stop drawing; the bar stays as it is, and later updates do nothing."""
        if self.visible:
            self._bar.stop()
        self.visible = False

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
