"""The list of deliberate bugs fits the code, and the script tells caught ones from others."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from . import run
from .mutants import MUTANTS, Mutant


@pytest.mark.parametrize("name", MUTANTS)
def test_every_bug_can_be_applied(name):
    mutant = MUTANTS[name]
    assert run.problem(run.ROOT, mutant) is None
    assert mutant.old != mutant.new
    files = [word for word in shlex.split(mutant.tests) if word.startswith("tests/")]
    assert files
    assert all((run.ROOT / file).exists() for file in files)


def test_outcomes(tmp_path):
    (tmp_path / "doubling.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "test_it.py").write_text(TESTS)
    bug = Mutant("doubling.py", "2 * x", "3 * x", "test_it.py -k double")
    assert run.outcome(tmp_path, bug) == "caught"
    assert run.outcome(tmp_path, bug._replace(new="x + x")) == "SURVIVED"
    assert run.outcome(tmp_path, bug._replace(tests="test_missing.py")) == "pytest ended with 4"
    assert Path(tmp_path / "doubling.py").read_text().count("2 * x") == 1
    assert "occurs 0 times" in run.problem(tmp_path, bug._replace(old="4 * x"))
    assert "does not exist" in run.problem(tmp_path, bug._replace(file="other.py"))


TESTS = """import doubling

def test_double():
    assert doubling.double(2) == 4
"""
