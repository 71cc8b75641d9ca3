"""`vpd-fast bench`: plain and fast models and other libraries, side by side."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from vpd_fast.cli import files, options
from vpd_fast.config import SIZE_MULTIPLE
from vpd_fast.errors import ImageError, InputError
from vpd_fast.files import write_files, write_json
from vpd_fast.progress import ProgressBar, error_console

if TYPE_CHECKING:
    from vpd_fast.bench.runner import Bench, Measurement
    from vpd_fast.bench.variants import Source
    from vpd_fast.config import VPDConfig

measuring_option, output_option = options.in_panel("Measuring"), options.in_panel("Output")
in_process_option = options.in_panel("In one process")


def bench(
    context: typer.Context,
    checkpoint: options.Checkpoint = None,
    random_weights: options.RandomWeights = None,
    task: options.Task = None,
    config: options.Config = None,
    precision: Annotated[
        str | None,
        measuring_option(
            metavar="NAME,...",
            help="Of the fast models: fp32, bf16, int8, on a GPU also fp16, fp8; or none. [default: all]",
        ),
    ] = None,
    peers: Annotated[
        str,
        measuring_option(
            metavar="NAME,...",
            help="all, none, diffusers, openvino, or one such as openvino-int8; what is not installed is left out.",
        ),
    ] = "all",
    in_process: Annotated[
        bool, in_process_option("--in-process", help="All variants in this process, no peers.")
    ] = False,
    device: Annotated[str, in_process_option(metavar="NAME", help="cpu or cuda, with --in-process.")] = "cpu",
    backends: Annotated[
        str, in_process_option(metavar="NAME,...", help="Attention of plain models, besides plain.")
    ] = "sdpa",
    compile: Annotated[bool, in_process_option(help="With torch.compile on a GPU, which takes minutes.")] = True,
    compile_seconds: Annotated[
        float, in_process_option(min=1, help="The most that it may take for a variant and a case.")
    ] = 300,
    size: Annotated[str, measuring_option(metavar="N,...", help="Height and width in pixels.")] = "512",
    batch: Annotated[str, measuring_option(metavar="N,...", help="Images per pass.")] = "1",
    rounds: Annotated[int, measuring_option(min=1, help="Passes of each variant.")] = 10,
    seconds: Annotated[
        float, measuring_option(min=0, help="Stop a case after this time, if three rounds are done.")
    ] = 600,
    threads: Annotated[
        int | None, measuring_option(min=1, help="Of each variant. [default: as PyTorch chooses]")
    ] = None,
    json: Annotated[Path | None, output_option(metavar="FILE", help="Write all numbers there.")] = None,
    chart: Annotated[Path | None, output_option(metavar="FILE", help="Draw them there, as PNG.")] = None,
) -> None:
    """Measure time, memory and agreement of the plain model, its fast forms and other libraries on this CPU.

    Every variant runs in a process of its own; they take turns, round by round, and a speed-up is the median of the
    ratios within a round. It is shown only if features and logits agree with the plain model's. Other libraries compute
    encoder and UNet only. An interruption keeps what is there.

    With --in-process variants share one process, on a CPU or a GPU, one by one beside the plain model: plain models
    also in bfloat16 (autocast, on a GPU channels-last and compiled). A GPU's clocks and power are kept, and passes are
    timed as they are called and as CUDA graphs. Random weights are drawn by the device.

    What is measured is printed and written to --json at once.
    """
    if context.invoked_subcommand is not None:
        if any(getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE" for name in context.params):
            raise InputError(f"options of bench {context.invoked_subcommand} come after its name, got some before it")
        return
    import torch

    from vpd_fast.bench import catalog
    from vpd_fast.bench.in_process import Shared
    from vpd_fast.bench.runner import Bench
    from vpd_fast.bench.variants import Case

    random_weights = 0 if checkpoint is None and random_weights is None else random_weights
    if device not in ("cpu", "cuda") or (device == "cuda" and not in_process):
        raise InputError(f"--device must be cpu, or cuda with --in-process, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no NVIDIA GPU here")
    model_options = options.ModelOptions(checkpoint, random_weights, task, config, device, None)
    precisions = None if precision is None else [name for name in _names(precision) if name != "none"]
    if in_process:
        names, left_out = catalog.choose_in_process(device, _names(backends), precisions, compile)
    else:
        names, left_out = catalog.choose(list(catalog.FAST) if precisions is None else precisions, _names(peers))
    sizes = _numbers("--size", size, SIZE_MULTIPLE)
    cases = [Case(side, images) for side in sizes for images in _numbers("--batch", batch, 1)]
    files.check_output_file("--json", json, ".json")
    files.check_output_file("--chart", chart, ".png")

    with _interrupted_by_termination(), tempfile.TemporaryDirectory(prefix="vpd-fast-bench-") as scratch:
        source, model_config = _prepare(model_options, Path(scratch), threads, in_process, compile_seconds)
        parts = catalog.in_order(device, names) if in_process else [("calls", names)]
        runs = [(timed, Bench(source, model_config, part, cases, rounds, seconds)) for timed, part in parts]
        report = _Report(runs, left_out, model_options, json)
        finished = False
        try:
            for timed, run in runs:
                if isinstance(source, Shared):
                    source.timed = timed
                _run(run, partial(report.add, timed))
            finished = True
        finally:
            # Also after an interruption: what is finished is worth having.
            rows = report.end(finished, chart)
    if any("error" in row or (in_process and row.get("parity") == "failed") for row in rows):
        raise typer.Exit(1)


@contextmanager
def _interrupted_by_termination() -> Iterator[None]:
    """Treat a request to end, by `timeout` for example, as an interruption: gigabytes in files must not stay."""

    def interrupt(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _prepare(
    model_options: options.ModelOptions, scratch: Path, threads: int | None, in_process: bool, compile_seconds: float
) -> tuple[Source, VPDConfig]:
    """The source of models, whose weights are in a file for all processes or in this process, and what they are."""
    import torch

    from vpd_fast.bench.variants import Source
    from vpd_fast.models import VPD

    if in_process and threads is not None:
        torch.set_num_threads(threads)
    with error_console().status("preparing the weights"):
        model = model_options.load(drawn_on=model_options.device)
        path = model_options.checkpoint
        if not isinstance(model, VPD):
            raise InputError(f"--checkpoint {path} is a fast model; give the weights it was made from")
        threads = threads or torch.get_num_threads()
        if in_process:
            from vpd_fast.bench.in_process import Shared

            return Shared(model, scratch, threads, compile_seconds), model.config
        if path is None:
            path = scratch / "model"
            model.save_pretrained(path)
    return Source(path, scratch, threads), model.config


def _run(run: Bench, on_measured: Callable[[Measurement], None]) -> None:
    """Run it with a progress bar on stderr, if that is a terminal."""
    with ProgressBar(run.steps) as bar:
        run.on_step = lambda text, done: bar.update(description=text, advance=done)
        run.on_measured = on_measured
        run.run()


class _Report:
    """What is printed, and the file of all numbers, which is written anew for each measurement."""

    def __init__(
        self,
        runs: list[tuple[str, Bench]],
        left_out: list[str],
        model_options: options.ModelOptions,
        path: Path | None,
    ) -> None:
        from vpd_fast.bench.environment import environment

        self._runs, self._left_out, self._path = runs, left_out, path
        self._source, self._config = runs[0][1].source, runs[0][1].config
        self._about = environment(self._source.device) | {"threads": self._source.threads}
        if self._source.device == "cuda":
            from vpd_fast.bench import telemetry

            self._about |= telemetry.facts()
        weights = {"checkpoint": str(model_options.checkpoint)} if model_options.checkpoint else {
            "random_weights": model_options.random_weights
        }  # fmt: skip
        self._model = {**weights, "config": self._config.to_dict()}

    def add(self, timed: str, measurement: Measurement) -> None:
        """Print a measurement of a run that is timed so, and write the file."""
        from vpd_fast.bench import report

        row = self._write(finished=False)[timed, str(measurement.case), measurement.variant]
        typer.echo(report.line(row))

    def end(self, finished: bool, chart: Path | None) -> list[dict[str, Any]]:
        """Print the tables and write the files; the rows of all runs, which are named after how they were timed."""
        from rich.console import Console

        from vpd_fast.bench import report

        rows = list(self._write(finished).values())
        console = Console()
        if not console.is_terminal:  # nothing to fit into
            console = Console(width=220)
        for case in dict.fromkeys((row["case"], row.get("timed")) for row in rows):
            console.print(report.table([row for row in rows if (row["case"], row.get("timed")) == case]))
        for line in report.remarks(rows, self._left_out):
            typer.echo(line)
        if not finished:
            typer.echo("not finished: these are the rounds that were complete")
        if chart is not None and rows:
            from vpd_fast.bench import plots

            about = self._about
            footer = (
                f"{about['device']}, {about['threads']} threads, vpd_fast {about['vpd_fast']}, torch {about['torch']}"
            )
            figure = plots.stage_bars(rows, footer)
            write_files({chart: lambda path: plots.save(figure, path)})
        return rows

    def _write(self, finished: bool) -> dict[tuple[str, str, str], dict[str, Any]]:
        """Write the file, if one is wanted; its rows, see `_rows`."""
        rows = self._rows()
        if self._path is not None:
            values = {
                "environment": self._about,
                "model": self._model,
                "finished": finished,
                "left_out": self._left_out,
                "rows": list(rows.values()),
            }
            write_files({self._path: partial(write_json, values=values)}, ImageError)
        return rows

    def _rows(self) -> dict[tuple[str, str, str], dict[str, Any]]:
        """The rows of all runs by how they were timed, case and variant; of a baseline's, those of the first run."""
        from vpd_fast.bench import report
        from vpd_fast.bench.in_process import Shared

        source = self._source
        rows: dict[tuple[str, str, str], dict[str, Any]] = {}
        for timed, run in self._runs:
            for measurement in run.ordered():
                row = report.row_of(measurement, self._config.task, source.threads)
                if source.device == "cuda" and isinstance(source, Shared):
                    row |= {"timed": timed} | source.telemetry.medians(f"{timed} {measurement.variant}")
                rows.setdefault((timed, row["case"], row["variant"]), row)
        return rows


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(option: str, text: str, multiple: int) -> list[int]:
    """Positive multiples of a number, separated by commas. Raises InputError."""
    try:
        numbers = [int(part) for part in _names(text)]
    except ValueError:
        numbers = []
    if not numbers or any(number < 1 or number % multiple for number in numbers):
        kind = f"positive multiples of {multiple}" if multiple > 1 else "positive integers"
        raise InputError(f"{option} must be {kind} separated by commas, got {text!r}")
    return list(dict.fromkeys(numbers))
