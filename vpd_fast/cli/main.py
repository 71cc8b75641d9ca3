"""`vpd-fast`: the commands, and how errors and interruptions end the program."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, NoReturn

import typer

from vpd_fast import _startup
from vpd_fast.cli.bench import bench
from vpd_fast.cli.bench_pipeline import pipeline
from vpd_fast.cli.compile_kernels import compile_kernels
from vpd_fast.cli.convert import convert
from vpd_fast.cli.demo import demo
from vpd_fast.cli.evaluate import evaluate
from vpd_fast.cli.info import info
from vpd_fast.cli.maps import maps
from vpd_fast.cli.predict import predict
from vpd_fast.cli.train import train
from vpd_fast.cli.tune import tune
from vpd_fast.errors import VPDFastError

app = typer.Typer(
    name="vpd-fast",
    help="Perception with Stable Diffusion's UNet (VPD): semantic segmentation, referring segmentation and depth.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)
for command in (demo, predict, maps, train, evaluate, convert, tune, compile_kernels, info):
    app.command()(command)
benches = typer.Typer()
benches.callback(invoke_without_command=True)(bench)
benches.command()(pipeline)
app.add_typer(benches, name="bench")


def _print_version(asked: bool) -> None:
    if asked:
        from vpd_fast import __version__

        typer.echo(f"vpd-fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> NoReturn:
    """Run the command line, and end the program with its exit code."""
    _startup.leave(run())


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: done. 1: some images of several failed. 2: wrong usage or input, or a model or disk that failed, after one line
    "error: ..." on stderr; where VPD_FAST_TRACEBACK is set and not 0, the stack comes before it.
    130: interrupted by SIGINT or SIGTERM, or training stopped by one, with its steps saved.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8, nor terminals take it
    with interruptible():
        return _run(arguments)


@contextmanager
def interruptible() -> Iterator[None]:
    """Make SIGINT and SIGTERM a KeyboardInterrupt, in the main thread, which alone has signals."""
    main = threading.current_thread() is threading.main_thread()
    before = _startup.set_handlers(_startup.interrupt) if main else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        # Not standalone: typer would print its own boxes for errors, and turn an interruption into "Aborted!".
        code = app(args=None if arguments is None else list(arguments), prog_name="vpd-fast", standalone_mode=False)
    except VPDFastError as error:
        if os.environ.get("VPD_FAST_TRACEBACK", "0") not in ("", "0"):
            traceback.print_exc()
        return _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        return _startup.INTERRUPTED
    except Exception as error:
        # Usage errors are click's ClickException, or typer's copy of it where it brings its own click.
        format_message = getattr(error, "format_message", None)
        if format_message is None:
            raise
        message = format_message()
        if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help text
            typer.echo(message)
            return 2
        return _fail(message)
    return code or 0


def _fail(message: str) -> int:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return 2


if __name__ == "__main__":
    main()
