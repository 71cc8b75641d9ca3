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


@pytest.fixture
def project(tmp_path) -> Path:
    (tmp_path / "doubling.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "test_it.py").write_text(TESTS)
    return tmp_path


def test_outcomes(project):
    bug = Mutant("doubling.py", "2 * x", "3 * x", "test_it.py -k double")
    outcome = run.try_bug(project, bug)
    assert outcome[:2] == ("test_it.py::test_double[a - b]", None)
    assert run.try_bug(project, bug._replace(new="x + x"))[:2] == (None, "SURVIVED")
    assert run.try_bug(project, bug._replace(tests="test_missing.py"))[:2] == (None, "pytest ended with 4")
    assert (
        run.try_bug(project, bug._replace(new="1 / 0 * x", tests="test_it.py -k fixture")).words == "a fixture failed"
    )
    assert run.try_bug(project, bug, seconds=0.01).words == "no test failed in 0.01 s"
    assert (project / "doubling.py").read_text().count("2 * x") == 1
    assert "occurs 0 times" in run.problem(project, bug._replace(old="4 * x"))
    assert "does not exist" in run.problem(project, bug._replace(file="other.py"))


def test_a_test_that_always_fails_catches_nothing(project):
    bug = Mutant("doubling.py", "2 * x", "3 * x", "test_it.py -k 'double or fails'")
    outcomes = {"a": run.try_bug(project, bug), "b": run.try_bug(project, bug._replace(tests="test_it.py -k fails"))}
    assert [outcome.words for outcome in outcomes.values()] == ["caught", "caught"]
    outcomes = run.without_bugs(project, outcomes)
    assert [outcome.words for outcome in outcomes.values()] == ["caught", "its test fails without it"]
    assert run.table(outcomes).splitlines()[1].endswith("its test fails without it: test_it.py::test_fails")


TESTS = """import doubling
import pytest

@pytest.mark.parametrize("x", [2], ids=["a - b"])
def test_double(x):
    assert doubling.double(x) == 4

@pytest.fixture
def four():
    return doubling.double(2)

def test_of_fixture(four):
    assert four == 4

def test_fails():
    assert False
"""
