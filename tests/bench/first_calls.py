"""What Triton would have to compile for the first calls of models, by an archive, the launcher and a stub driver.

first_calls.py LAUNCHER STUB ARCHIVE [--precision NAME ...] [--batch N ...]: a JSON object on standard output, see
`main`. If there is no such archive, one of kernels without machine code is made, with the keys of a wheel's. A program,
because tests interpret kernels.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from recorded_passes import dummy

from vpd_fast.bench import compilation, launches
from vpd_fast.config import PRECISIONS
from vpd_fast.kernels import cubins
from vpd_fast.kernels.specialization import specialize

SIZE = 512


def tables(launcher: str, stub: str, archive: Path) -> dict[str, cubins.Table]:
    """The kernels of the archive for each architecture that it has."""
    spec = importlib.util.spec_from_file_location("launcher", launcher)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    content, driver = cubins.Archive.read(archive), module.Driver(stub)
    return {architecture: cubins.Table(content, architecture, driver) for architecture in content.entries}


def main(arguments: list[str]) -> dict[str, Any]:
    """launches: of all passes, by architecture. missed: of these, what is not in the archive, by configuration."""
    parser = argparse.ArgumentParser()
    for name in ("launcher", "stub"):
        parser.add_argument(name)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--precision", nargs="+", default=list(PRECISIONS))
    parser.add_argument("--batch", nargs="+", type=int, default=list(launches.BATCHES))
    options = parser.parse_args(arguments)
    chosen = launches.configurations(precisions=options.precision, batches=options.batch, sizes=[SIZE])
    if not options.archive.exists():
        jobs = compilation.jobs_of(chosen, launches.GPUS, lambda line: print(line, file=sys.stderr))
        sources = cubins.hash_of_sources()
        compilation.write_archive(options.archive, {job: dummy(job[1]) for job in jobs}, sources)
    of = tables(options.launcher, options.stub, options.archive)
    launched, missed = dict.fromkeys(of, 0), {}
    warnings.simplefilter("ignore")  # of what is missed
    model, made = None, None
    for configuration in chosen:

        def launch(architecture: str, kernel: Any, grid: tuple, values: dict, name: str = str(configuration)) -> None:
            launched[architecture] += 1
            if not of[architecture].launch(kernel, grid, values, 0, 0):
                missed.setdefault(f"{name} on {architecture}", {})[specialize(kernel, values)[0]] = None

        if made != configuration.engine:
            made = configuration.engine
            model = launches.EmptyModel(*made)
        # Of every call of an operator, unlike what the archive is made from.
        model.record(configuration.batch, configuration.size, launch, list(of))
        print(f"{configuration}: {launched}, {len(missed)} missed", file=sys.stderr)
    return {"launches": launched, "missed": {name: list(keys) for name, keys in missed.items()}}


if __name__ == "__main__":
    json.dump(main(sys.argv[1:]), sys.stdout)
