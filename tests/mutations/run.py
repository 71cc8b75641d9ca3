"""Tests of the tests: applies deliberate bugs, one at a time, to a copy of the project, and says which are noticed.

    python tests/mutations/run.py [--check] [--seconds N] [NAME ...]

The exit code is 0 if every bug is caught: a test of those named beside it fails, and passes without the bug. NAME is a
part of the names of those to run. Bugs of Python come first, then those of kernels; CPU kernels need the native module
to be compiled again, which takes minutes. --check only looks whether every bug can still be applied.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.mutations.mutants import MUTANTS, Mutant  # noqa: E402

MAX_SECONDS = 600  # of a bug's tests
NOT_COPIED = (".git", ".*_cache", "__pycache__", "build", "dist", "*.egg-info", "results", "node_modules")
NO_TEST_FAILED = (0, 5)  # exit codes of pytest: all passed, none was chosen
MODULE = "vpd_fast/_C.*.so"


class Outcome(NamedTuple):
    """What became of a bug: `test` is the one that noticed it, `problem` says why it does not count as caught."""

    test: str | None
    problem: str | None
    seconds: float

    @property
    def words(self) -> str:
        return self.problem or "caught"


def problem(root: Path, mutant: Mutant) -> str | None:
    """Why a bug cannot be applied, or None."""
    path = root / mutant.file
    if not path.is_file():
        return f"{mutant.file} does not exist"
    count = path.read_text().count(mutant.old)
    return None if count == 1 else f"{mutant.old!r} occurs {count} times in {mutant.file}, expected once"


def run_tests(root: Path, words: Iterable[str], seconds: float) -> tuple[int | None, list[str], list[str]]:
    """Runs pytest. Returns its exit code (None after that many seconds), the tests that failed, and those whose
    fixtures did."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=no", "-m", "not slow", *words]
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "1000"}
    try:
        done = subprocess.run(command, cwd=root, env=environment, timeout=seconds, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return None, [], []
    failed, broken = (
        re.findall(rf"^{word} (\S+?::[^[\s]+(?:\[.*?\])?)(?: - .*)?$", done.stdout, flags=re.MULTILINE)
        for word in ("FAILED", "ERROR")
    )
    return done.returncode, failed, broken


@contextmanager
def applied(root: Path, mutant: Mutant) -> Iterator[str | None]:
    """The project with the bug; gives the reason where it cannot be compiled. Everything is as before afterwards."""
    path = root / mutant.file
    whole = path.read_text()
    modules = {module: module.read_bytes() for module in root.glob(MODULE)} if mutant.rebuilds else {}
    path.write_text(whole.replace(mutant.old, mutant.new))
    try:
        yield "cannot be compiled" if mutant.rebuilds and not rebuild(root) else None
    finally:
        path.write_text(whole)
        for module, content in modules.items():
            module.unlink(missing_ok=True)  # a process that has it mapped would crash if it were overwritten
            module.write_bytes(content)


def rebuild(root: Path) -> bool:
    """Compiles what has changed of the CPU's native module, for one instruction set; whether that was possible."""
    hook = root / "baseline.cmake"
    hook.write_text('set(CMAKE_SYSTEM_PROCESSOR "one without levels")\n')  # a quarter of the work
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = os.environ | {"VPD_FAST_CUDA": "OFF", "CMAKE_ARGS": f"-DCMAKE_PROJECT_INCLUDE={hook}"}
    return not subprocess.run(command, cwd=root, env=environment, stdout=subprocess.DEVNULL).returncode


def try_bug(root: Path, mutant: Mutant, seconds: float = MAX_SECONDS) -> Outcome:
    """Runs the tests of a bug with it, until the first that fails."""
    with applied(root, mutant) as reason:
        begin = time.monotonic()
        if reason is not None:
            return Outcome(None, reason, 0.0)
        code, failed, broken = run_tests(root, ["-x", *shlex.split(mutant.tests)], seconds)
        taken = time.monotonic() - begin
    if code in NO_TEST_FAILED:
        return Outcome(None, "SURVIVED", taken)
    if code is None:
        return Outcome(None, f"no test failed in {seconds:g} s", taken)
    if broken:  # such as that of a kernel that cannot be compiled any more
        return Outcome(broken[0], "a fixture failed", taken)
    return (
        Outcome(failed[0], None, taken) if code == 1 and failed else Outcome(None, f"pytest ended with {code}", taken)
    )


def without_bugs(root: Path, outcomes: dict[str, Outcome]) -> dict[str, Outcome]:
    """The outcomes; a bug is not caught by a test that fails without it as well."""
    tests = sorted({outcome.test for outcome in outcomes.values() if outcome.test is not None})
    if not tests:
        return outcomes
    code, failed, broken = run_tests(root, tests, MAX_SECONDS + 60 * len(tests))
    failing = {*failed, *broken} if code in (0, 1) else set(tests)
    return {
        name: outcome._replace(problem="its test fails without it") if outcome.test in failing else outcome
        for name, outcome in outcomes.items()
    }


def table(outcomes: dict[str, Outcome]) -> str:
    """One line for each bug."""
    width = max(map(len, outcomes))
    return "\n".join(
        f"{name:<{width}}  {outcome.seconds:5.0f} s  {outcome.words}{f': {outcome.test}' if outcome.test else ''}"
        for name, outcome in outcomes.items()
    )


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 if all bugs are caught (or, with --check, can be applied)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names")
    parser.add_argument("--check", action="store_true", help="only look whether the bugs can be applied")
    parser.add_argument("--seconds", type=float, default=MAX_SECONDS, help="that a bug's tests may take (%(default)s)")
    options = parser.parse_args(arguments)
    chosen = {n: m for n, m in MUTANTS.items() if not options.names or any(part in n for part in options.names)}
    problems = {name: text for name, mutant in chosen.items() if (text := problem(ROOT, mutant)) is not None}
    for name, text in problems.items():
        print(f"{name}: cannot be applied: {text}")
    if options.check or problems or not chosen:
        return int(bool(problems) or not chosen)
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "copy"
        shutil.copytree(ROOT, root, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
        for name, mutant in sorted(chosen.items(), key=lambda item: (item[1].rebuilds, item[1].is_of_kernels)):
            outcomes[name] = try_bug(root, mutant, options.seconds)
            print(f"[{len(outcomes)}/{len(chosen)}] {table({name: outcomes[name]})}", flush=True)
        outcomes = without_bugs(root, outcomes)
    caught = sum(outcome.problem is None for outcome in outcomes.values())
    print(f"\n{table(outcomes)}\n{caught} of {len(outcomes)} caught")
    return int(caught < len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
