"""Runs that are killed at any file operation lose nothing that they recorded, and go on as if nothing had happened.

A few kills of each command by default; `--kills 40` for that many, at operations spread over the whole run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vpd_fast import VPDConfig

from ..helpers import processes, runs
from ..helpers.backbones import TINY
from .server import serve

pytestmark = pytest.mark.drill

Command = Callable[..., tuple[int, int]]  # (arguments, folder, kill_at=None) -> (exit code, file operations)
KILLED = -9
IMAGES = 5


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """Runs a command of `vpd-fast` in a process of its own, which is killed before operation number `kill_at`."""
    log = tmp_path_factory.mktemp("log") / "log"
    requests, theirs = Pipe()
    process = processes.start(serve, theirs, log=log.with_name("server"))
    theirs.close()

    def run(arguments: list[str], folder: Path, kill_at: int | None = None) -> tuple[int, int]:
        log.unlink(missing_ok=True)
        requests.send((arguments, str(folder), kill_at, str(log)))
        code, operations = requests.recv()
        assert code in ((0,) if kill_at is None else (0, KILLED)), log.read_text()
        return code, operations

    yield run
    requests.close()
    process.join(timeout=30)


def points(operations: int, kills: int) -> list[int]:
    """Numbers of operations, spread over all of them; the last is one of them."""
    return sorted({max(1, round(i * operations / kills)) for i in range(1, kills + 1)})


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_predict(command: Command, tmp_path: Path, kills: int) -> None:
    VPDConfig(num_classes=5, channels=32, base_size=64, backbone=TINY).save(tmp_path / "config.json")
    for i in range(IMAGES):
        path = tmp_path / "images" / ("sub" if i % 2 else ".") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    model = ["--random-weights", "1", "--config", str(tmp_path / "config.json"), "--mode", "whole"]
    arguments = ["predict", str(tmp_path / "images"), "-r", *model, "--resume", "-o"]
    _, operations = command([*arguments, str(tmp_path / "whole")], tmp_path / "whole")
    whole = {name: data for name, data in content(tmp_path / "whole").items() if name.endswith((".png", ".jpg"))}
    assert len(whole) == 2 * IMAGES
    assert operations > 4 * IMAGES
    out = tmp_path / "out"
    for kill_at in points(operations, kills):
        shutil.rmtree(out, ignore_errors=True)
        code, _ = command([*arguments, str(out)], out, kill_at)
        assert code == KILLED, kill_at
        found = content(out) if out.exists() else {}
        pictures = {name: data for name, data in found.items() if not Path(name).name.startswith(".")}
        text = pictures.pop("results.jsonl", b"").decode()
        pictures.pop("failed.txt", None)
        assert pictures.items() <= whole.items(), kill_at  # what has its name is whole
        records = [json.loads(line) for line in text.splitlines(keepends=True)[1:] if line.endswith("\n")]
        assert {name for record in records for name in record["files"]} <= pictures.keys(), kill_at
        command([*arguments, str(out)], out)
        found = content(out)
        lines = [json.loads(line) for line in found.pop("results.jsonl").splitlines()]
        assert sorted(line["image"] for line in lines[1:]) == sorted({line["image"] for line in lines[1:]}), kill_at
        assert len(lines) == IMAGES + 1
        assert found == whole, kill_at  # and nothing else is there


def test_train(command: Command, tmp_path: Path, data: Path, kills: int) -> None:
    config = runs.tiny(
        "segmentation", data, schedule={"steps": 3}, checkpoints={"every_steps": 1, "keep": 2}, log={"every": 2}
    )
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    arguments = ["train", str(tmp_path / "run.yaml"), "--resume", "auto", "-o"]
    _, operations = command([*arguments, str(tmp_path / "whole")], tmp_path / "whole")
    whole = content(tmp_path / "whole")
    assert operations > 20
    out = tmp_path / "out"
    for kill_at in points(operations, kills):
        shutil.rmtree(out, ignore_errors=True)
        code, _ = command([*arguments, str(out)], out, kill_at)
        assert code == KILLED, kill_at
        for path in sorted((out / "checkpoints").glob("step_*")):
            before = tmp_path / "whole" / "checkpoints" / path.name
            assert runs.weights(path)  # whole: it can be read
            if before.exists():
                assert runs.same(runs.weights(path), runs.weights(before)), kill_at
        command([*arguments, str(out)], out)
        found = content(out)
        assert found.keys() == whole.keys(), kill_at
        losses = [
            [
                entry.get("loss", entry.get("evaluation"))
                for entry in map(json.loads, files["metrics.jsonl"].splitlines())
            ]
            for files in (whole, found)
        ]
        assert losses[0] == losses[1], kill_at
        for name in ("best", "checkpoints/step_000003"):
            assert runs.same(runs.weights(out / name), runs.weights(tmp_path / "whole" / name)), kill_at
