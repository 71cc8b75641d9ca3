"""Signals that end a run in order."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """While entered, SIGTERM and SIGINT set `asked`; the run finishes its step and saves. A second one ends at once.

    breakable: a first one ends at once, too, as KeyboardInterrupt: set while nothing is lost by it.
    In a thread other than the main one, where Python has no signals, it does nothing.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.asked = False
        self.breakable = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._stop) for number in self.NUMBERS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, True
        if again or self.breakable:
            raise KeyboardInterrupt
