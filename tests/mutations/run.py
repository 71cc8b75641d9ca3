"""Tests of the tests: applies deliberate bugs, one at a time, to a copy of the project, and says which are noticed.

    python tests/mutations/run.py [--check] [NAME ...]

The exit code is 0 if every bug is caught. Bugs of CPU kernels need the native module to be compiled again, which takes
minutes; NAME is a part of the names of those to run. --check only looks whether every bug can still be applied.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.mutations.mutants import MUTANTS, Mutant  # noqa: E402

MAX_SECONDS = 900  # of a bug's tests
NOT_COPIED = (".git", ".*_cache", "__pycache__", "build", "dist", "*.egg-info", "results", "node_modules")
NO_TEST_FAILED = (0, 5)  # exit codes of pytest: all passed, none was chosen


def problem(root: Path, mutant: Mutant) -> str | None:
    """Why a bug cannot be applied, or None."""
    path = root / mutant.file
    if not path.is_file():
        return f"{mutant.file} does not exist"
    count = path.read_text().count(mutant.old)
    return None if count == 1 else f"{mutant.old!r} occurs {count} times in {mutant.file}, expected once"


def run_tests(root: Path, tests: str) -> int | None:
    """The exit code of pytest, None where it took longer than MAX_SECONDS."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-m",
        "not slow",
        "-p",
        "no:cacheprovider",
        *shlex.split(tests),
    ]
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=root, env=environment, timeout=MAX_SECONDS, capture_output=True)
    except subprocess.TimeoutExpired:
        return None
    return done.returncode


def outcome(root: Path, mutant: Mutant) -> str:
    """Applies the bug, runs its tests and takes it back. Returns "caught", "SURVIVED", or why neither is known."""
    path = root / mutant.file
    whole = path.read_text()
    path.write_text(whole.replace(mutant.old, mutant.new))
    try:
        if mutant.rebuilds:
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            if subprocess.run(build, cwd=root, env=os.environ | {"VPD_FAST_CUDA": "OFF"}).returncode:
                return "cannot be compiled"
        code = run_tests(root, mutant.tests)
    finally:
        path.write_text(whole)
    if code in NO_TEST_FAILED:
        return "SURVIVED"
    if code != 1:
        return f"tests took longer than {MAX_SECONDS} s" if code is None else f"pytest ended with {code}"
    # The tests of a rebuilt module would need yet another build: whoever changed it has run them.
    return "caught" if mutant.rebuilds or run_tests(root, mutant.tests) == 0 else "tests fail without it"


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 if all bugs are caught (or, with --check, can be applied)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names")
    parser.add_argument("--check", action="store_true", help="only look whether the bugs can be applied")
    options = parser.parse_args(arguments)
    chosen = {n: m for n, m in MUTANTS.items() if not options.names or any(part in n for part in options.names)}
    problems = {name: text for name, mutant in chosen.items() if (text := problem(ROOT, mutant)) is not None}
    for name, text in problems.items():
        print(f"{name}: cannot be applied: {text}")
    if options.check or problems or not chosen:
        return int(bool(problems) or not chosen)
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "copy"
        shutil.copytree(ROOT, root, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
        # Bugs that need another native module come last, so that all others run with the right one.
        for name, mutant in sorted(chosen.items(), key=lambda item: item[1].rebuilds):
            result = outcome(root, mutant)
            failures += result != "caught"
            print(f"{result:<10} {name}", flush=True)
    print(f"{len(chosen) - failures} of {len(chosen)} caught")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
