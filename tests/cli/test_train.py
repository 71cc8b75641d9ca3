"""`vpd-fast train` from the shell: plans, runs, resuming, and what it says about mistakes."""

from __future__ import annotations

import shutil

import pytest
import torch.distributed.run
from PIL import Image

from vpd_fast import VPD
from vpd_fast.cli.main import run

from ..helpers import processes, runs


@pytest.fixture
def file(data, tmp_path):
    """`file(task)`: a configuration file of a tiny run."""

    def write(task: str, **changes) -> str:
        path = tmp_path / f"{task}.yaml"
        runs.tiny(task, data, **changes).save(path)
        return str(path)

    return write


def test_a_run_and_its_model(file, tmp_path, capsys):
    config, folder = file("referring"), tmp_path / "run"
    assert run(["train", config, "schedule.steps=2", "-o", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "2 steps done" in out
    assert f"best model: {folder / 'best'} (oIoU " in out
    assert f'vpd-fast predict IMAGE --checkpoint {folder / "best"} --text "what to look for"' in out
    assert VPD.from_pretrained(folder / "best").config.tokens == runs.TOKENS
    assert "steps: 2" in (folder / "config.yaml").read_text()

    assert run(["train", config, "schedule.steps=2", "-o", str(folder)]) == 2
    assert "is not empty; --resume auto goes on" in capsys.readouterr().err
    assert run(["train", config, "schedule.steps=3", "-o", str(folder), "--resume", "auto"]) == 2
    assert "another configuration: schedule.steps is 3, was 2" in " ".join(capsys.readouterr().err.split())
    assert run(["train", config, "schedule.steps=2", "-o", str(folder), "--resume", "auto"]) == 0
    # The configuration of a run is a configuration file.
    assert run(["train", str(folder / "config.yaml"), "-o", str(tmp_path / "again")]) == 0
    first, second = (runs.weights(where / "best") for where in (folder, tmp_path / "again"))
    assert runs.same(first, second)


@pytest.mark.parametrize(
    "task", ["segmentation", *(pytest.param(task, marks=pytest.mark.slow) for task in ("referring", "depth"))]
)
def test_a_dry_run_writes_nothing(file, task, tmp_path, capsys, monkeypatch):
    config = file(task)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert run(["train", config, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "note:" not in out.replace("note: the weights are random", "")
    count = {"segmentation": (4, 4), "referring": (4, 2), "depth": (4, 4)}[task]
    assert f"{task}: {count[0]} samples to train on, {count[1]} to evaluate on" in out
    assert "6 steps of 2 images (1 processes x 1 x 2), 3.0 epochs" in out
    assert "schedule poly" in out
    assert "lr 0.001 to 0.000199" in out  # 0.001 * (1 / 6) ** 0.9 at the last step
    assert "memory of a step, estimated: " in out
    assert "one batch forward and backward: loss " in out
    assert sorted(tmp_path.rglob("*")) == before
    assert run(["train", config, "--dry-run", "--no-step"]) == 0
    assert "one batch" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ade2k", "-o", "x"], "did you mean ade20k?"),
        (["ade20k", "-o", "x"], "data.root is not set"),
        (["ade20k", "data.root=x", "-o", "x"], "init must say where the weights come from"),
        (["ade20k", "data.root=nowhere", "init.random=0", "-o", "x"], "nowhere"),
        (["ade20k", "optimizer.learning=1", "-o", "x"], "optimizer.learning is not a setting"),
        (["ade20k"], "-o is missing"),
    ],
)
def test_mistakes(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_torchrun(file, tmp_path):
    """Two processes under torchrun: one report."""
    config, folder = file("segmentation"), tmp_path / "run"
    launch = ["--standalone", "--nproc-per-node", "2", "-m", "vpd_fast"]
    command = ["train", config, "schedule.steps=1", "-o", str(folder)]
    log = tmp_path / "log"
    printed = processes.run(torch.distributed.run.main, [*launch, *command], log=log, OMP_NUM_THREADS="1")
    assert printed.count("1 steps done") == 1
    assert printed.count("no SyncBatchNorm on CPUs") == 1
    assert (folder / "best" / "model.safetensors").is_file()


def test_images_too_small_for_statistics_name_the_setting(file, tmp_path, capsys):
    config = file("segmentation", batch_size=1)
    assert run(["train", config, "-o", str(tmp_path / "run")]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "of which there are no statistics" in err
    assert "batch_size" in err


def test_a_dry_run_tells_of_labels_that_look_wrong(file, data, tmp_path, capsys):
    root = tmp_path / "copy"
    shutil.copytree(data / "segmentation", root)
    for path in (root / "annotations/training").iterdir():
        Image.new("L", (96, 64), 2).save(path)
    (root / "images/training/more.png").write_bytes(b"")
    config = file("segmentation", data={"root": str(root)})
    assert run(["train", config, "--dry-run", "--no-step"]) == 0
    out = capsys.readouterr().out
    assert "note: training data: 1 left out: files in" in out
    assert (
        "note: training data: of 4 samples looked at: 4 of 5 classes have no pixel in the masks: ground, green" in out
    )
