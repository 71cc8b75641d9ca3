"""The progress bar: nothing where there is no terminal, count and description where there is one."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from vpd_fast.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with ProgressBar(4, "cats", completed=1) as bar:
        assert bar.visible
        bar.update(2, "[dogs]")  # no markup
        bar.update(advance=1)
        bar.message("a [line] above")
    assert not bar.visible
    bar.update(4, "later")
    drawn = terminal.getvalue()
    assert all(text in drawn for text in ("3/4", "[dogs]", "a [line] above"))
    assert "later" not in drawn


@pytest.mark.parametrize("visible", [None, False])
def test_elsewhere(visible: bool | None, capsys) -> None:
    with ProgressBar(4, visible=visible) as bar:
        bar.update(2, "dogs")
        bar.message("a [line]")
    assert capsys.readouterr().err == "a [line]\n"


def test_a_bar_that_is_not_drawn_loads_nothing() -> None:
    code = (
        "import sys; from vpd_fast.progress import ProgressBar\n"
        "with ProgressBar(3, visible=False) as bar: bar.update(1)\n"
        "assert 'rich' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
