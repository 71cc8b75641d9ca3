"""The workflows of GitHub are YAML whose commands and files exist."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# Programs of the runner's system, and those that the extra "dev" and this package install.
PROGRAMS = {"pip", "pipx", "apt-get", "python", "python3", "ls", "pytest", "vpd-fast", "/venv/bin/pip"}


def commands(workflow: dict[Any, Any]) -> list[str]:
    """What the steps run, once for each entry of a matrix that is used."""
    found = []
    for job in workflow["jobs"].values():
        entries = job.get("strategy", {}).get("matrix", {}).get("include", [{}])
        for step in job["steps"]:
            for entry in entries if "run" in step else ():
                filled = re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda m, e=entry: e.get(m[1], ""), step["run"])
                found += [part for line in filled.splitlines() for part in line.split(" && ")]
    return found


@pytest.mark.skipif(not WORKFLOWS, reason="the source distribution has no workflows")
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_commands_exist(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["jobs"]
    assert True in workflow, "YAML reads `on` as true"
    for command in commands(workflow):
        words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z]+=\S*", word)]
        program = words[0]
        if program.startswith(".ci/"):
            assert os.access(ROOT / program, os.X_OK), command
        else:
            assert program in PROGRAMS, command
        if program == "pytest":
            assert all((ROOT / word).exists() for word in words[1:] if word.startswith("tests/")), command


def test_what_runs_every_night() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "nightly.yml").read_text())
    assert workflow[True]["schedule"][0]["cron"].count(" ") == 4
    assert "workflow_dispatch" in workflow[True]
    runs = " | ".join(commands(workflow))
    for part in ("test_drill.py --drill 3000", "test_kills.py --kills 40", "-m slow", ".ci/sanitize"):
        assert part in runs
