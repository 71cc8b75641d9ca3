"""The folder of a run: one run at a time, full disks, what vanishes, and going on from what is there."""

from __future__ import annotations

import errno
import shutil

import pytest

from vpd_fast.errors import CheckpointError, InputError, TrainingError
from vpd_fast.training import checkpoint

from ..helpers import runs


def test_a_full_disk_ends_with_one_error(data, tmp_path, monkeypatch):
    config = runs.tiny("segmentation", data)
    write = checkpoint.write_state

    def full(path, values):
        if values["step"] == 6:
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, values)

    monkeypatch.setattr(checkpoint, "write_state", full)
    with pytest.raises(CheckpointError, match=r"step 6 cannot be written .*the disk is full.* the last one is .*03$"):
        runs.trainer(config, tmp_path / "run").run()
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("*step*")] == ["step_000003"]
    monkeypatch.setattr(checkpoint, "write_state", write)
    # As a kill in the middle would leave it:
    half = tmp_path / "run/checkpoints/.step_000006.abc.tmp"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert runs.trainer(config, tmp_path / "run", resume="auto").run().step == 6
    assert not half.exists()


def test_the_first_loss_after_resuming_is_that_of_an_unbroken_run(data, tmp_path):
    """The entry of step 4 is a mean over steps 3 and 4, of which the checkpoint comes between."""
    config = runs.tiny("segmentation", data, log={"every": 2}, data={"val_split": None})
    runs.trainer(config, tmp_path / "whole").run()
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "step_000006")
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    runs.trainer(config, tmp_path / "broken", resume="auto").run()
    first, second = (
        [(entry["step"], entry["loss"]) for entry in runs.entries(tmp_path / name)] for name in ("whole", "broken")
    )
    assert [step for step, _ in first] == [2, 4, 6]
    assert first == second


def test_two_runs_in_a_folder(data, tmp_path):
    config = runs.tiny("segmentation", data, schedule={"steps": 2}, data={"val_split": None})
    first, second, late = (runs.trainer(config, tmp_path / "run") for _ in range(3))
    step = first._one_step

    def both(*args):
        with pytest.raises(InputError, match="another run .*writes there"):
            second.run()
        return step(*args)

    first._one_step = both
    assert first.run().step == 2
    # Built while the folder was empty, and begun after another run had ended there.
    with pytest.raises(InputError, match="is not empty"):
        late.run()
    assert not list((tmp_path / "run").glob(".*"))
    again = runs.trainer(config, tmp_path / "run", resume="auto")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(InputError, match="another run has written there in the meantime"):
        again.run()


@pytest.mark.parametrize("what", ["config.yaml", "best", "checkpoints", "."])
def test_a_run_whose_folder_vanishes_fails(data, tmp_path, what):
    config = runs.tiny("segmentation", data, schedule={"steps": 3}, evaluation={"every_steps": 2, "limit": 1})
    trainer = runs.trainer(config, tmp_path / "run")
    evaluate = trainer._evaluate

    def vanish() -> None:
        if trainer.step < 3 or what == "checkpoints":
            evaluate()
            path = tmp_path / "run" / what
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    trainer._evaluate = vanish
    with pytest.raises(TrainingError, match="written by this run, and removed while it went on"):
        trainer.run()


def test_a_folder_with_no_checkpoint_promises_no_resuming(tmp_path, data):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(InputError, match="is not empty and has no checkpoint to go on from; give another folder"):
        runs.trainer(runs.tiny("segmentation", data), tmp_path / "run")
