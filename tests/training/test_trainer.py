"""Runs of all three tasks on miniature data sets: they learn, stop, go on, and end in order when something breaks."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import cv2
import pytest
import torch
from safetensors.torch import save_file

from vpd_fast import VPD
from vpd_fast.errors import CheckpointError, DatasetError, InputError, TrainingError
from vpd_fast.training import checkpoint
from vpd_fast.training.parallel import batch_norm_buffers
from vpd_fast.training.tasks import Task
from vpd_fast.training.trainer import Trainer

from ..helpers import miniature, runs


@pytest.fixture(scope="module", params=runs.TASKS)
def whole(request, data, tmp_path_factory):
    """A run of six steps in one go: (configuration, its folder, its summary)."""
    config = runs.tiny(request.param, data)
    folder = tmp_path_factory.mktemp("whole") / request.param
    return config, folder, runs.trainer(config, folder).run()


# What does not depend on the task; the other tasks are slow.
ONE_TASK = ["segmentation", *(pytest.param(task, marks=pytest.mark.slow) for task in ("referring", "depth"))]


def state(folder: Path, step: int) -> dict:
    return checkpoint.read_state(folder / "checkpoints" / f"step_{step:06d}")


def equal(first, second) -> bool:
    """Bit for bit, also in containers."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(equal(a, b) for a, b in zip(first, second, strict=True))
    return first == second


def test_a_run_leaves_a_model_metrics_and_checkpoints(whole):
    config, folder, summary = whole
    assert (summary.step, summary.steps, summary.stopped, summary.skipped_steps) == (6, 6, False, 0)
    assert sorted(path.name for path in folder.iterdir()) == ["best", "checkpoints", "config.yaml", "metrics.jsonl"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "index.json", "step_000003", "step_000006",
    ]  # fmt: skip
    *steps, evaluation = runs.entries(folder)
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5, 6]
    assert all(entry["loss"] > 0 for entry in steps)
    name, value = summary.metric
    assert name == {"segmentation": "mIoU", "referring": "oIoU", "depth": "rmse"}[config.task]
    assert evaluation["evaluation"][name] == value
    # The best model is that of the last step here, and differs from what the run began with.
    best = runs.weights(summary.best)
    assert runs.same(best, runs.weights(summary.last))
    model = VPD.from_pretrained(summary.best)
    assert model.config.task == config.task
    begin = runs.trainer(config, None).model.state_dict()
    changed = {key for key in best if not torch.equal(best[key], begin[key])}
    assert changed
    assert not any("encoder_vq" in key or "class_embeddings" in key for key in changed)


@pytest.mark.parametrize("whole", ONE_TASK, indirect=True)
def test_resuming_gives_what_an_unbroken_run_gives(whole, tmp_path):
    config, folder, _ = whole
    begin = folder / "checkpoints" / "step_000003"
    summary = runs.trainer(config, tmp_path / "run", resume=begin).run()
    assert summary.step == 6
    assert runs.same(runs.weights(summary.last), runs.weights(folder / "checkpoints" / "step_000006"))
    first, second = state(folder, 6), state(tmp_path / "run", 6)
    assert equal(first["optimizer"], second["optimizer"])
    assert equal(first["random"], second["random"])
    losses = [[e.get("loss") for e in runs.entries(where)] for where in (folder, tmp_path / "run")]
    assert losses[0][3:] == losses[1]


@pytest.mark.parametrize("whole", ONE_TASK, indirect=True)
def test_the_same_run_twice(whole, tmp_path):
    config, folder, summary = whole
    again = runs.trainer(config.replace(checkpoints={"every_steps": None}), tmp_path / "run").run()
    assert runs.same(runs.weights(summary.last), runs.weights(again.last))


def test_the_loss_goes_down(data, tmp_path):
    for task, lr in (("segmentation", 3e-3), ("referring", 1e-3), ("depth", 3e-4)):
        config = runs.tiny(
            task, data, schedule={"steps": 12, "name": "constant"}, optimizer={"lr": lr}, data={"val_split": None},
            checkpoints={"every_steps": None},
        )  # fmt: skip
        runs.trainer(config, tmp_path / task).run()
        losses = [entry["loss"] for entry in runs.entries(tmp_path / task)]
        assert sum(losses[-4:]) < 0.8 * sum(losses[:4]), (task, losses)


def test_accumulation_adds_up_the_passes(data):
    """Two passes of two images step as the mean of their gradients."""
    config = runs.tiny("depth", data, accumulation=2, optimizer={"lr": 1e-4}, schedule={"name": "constant"})
    one = runs.trainer(config, None)
    batches = one.loader.batches(0)
    expected: dict[str, torch.Tensor] = {}
    for _ in range(2):
        inputs = one.task.prepare(next(batches), one.encode, torch.device("cpu"))
        (one.train_step(inputs) / 2).backward()
    expected = {name: p.grad.clone() for name, p in one.model.named_parameters() if p.grad is not None}
    two = runs.trainer(config, None)
    seen = {}
    two.optimizer.step = lambda: seen.update(
        {n: p.grad.clone() for n, p in two.model.named_parameters() if p.grad is not None}
    )
    batches = two.loader.batches(0)
    two._one_step(two._fetch(batches), batches, False)
    assert equal(expected, seen)


def test_clipping(data):
    trainer = runs.trainer(runs.tiny("depth", data, optimizer={"clip": 0.5}), None)
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    parameters[0].grad.view(-1)[0], parameters[-1].grad.view(-1)[0] = 3.0, 4.0
    assert trainer._gradient_norm().item() == pytest.approx(5.0)
    assert parameters[0].grad.view(-1)[0].item() == pytest.approx(0.3, rel=1e-5)
    assert parameters[-1].grad.view(-1)[0].item() == pytest.approx(0.4, rel=1e-5)


def test_bf16_keeps_float32_weights(data, tmp_path):
    config = runs.tiny("segmentation", data, precision="bf16", schedule={"steps": 1}, data={"val_split": None})
    trainer = runs.trainer(config, tmp_path / "run")
    summary = trainer.run()
    assert summary.best is None
    assert {tensor.dtype for tensor in runs.weights(summary.last).values()} <= {torch.float32, torch.int64}
    runs.trainer(config.replace(precision="fp32"), tmp_path / "reference").run()  # with the same dropout
    loss, reference = (runs.entries(tmp_path / name)[0]["loss"] for name in ("run", "reference"))
    assert loss == pytest.approx(reference, rel=0.01)
    assert loss != reference


@pytest.mark.parametrize("whole", ["referring"], indirect=True)
def test_caches_change_nothing(whole, tmp_path):
    """The second run reads all latents from the disk."""
    config, folder, _ = whole
    cached = config.replace(encoder={"cache": str(tmp_path / "cache")})
    for name in ("first", "second"):
        trainer = runs.trainer(cached, tmp_path / name)
        files = len(list(tmp_path.glob("cache/latents/*/*.npy")))
        assert files == {"first": 0, "second": 4}[name]
        summary = trainer.run()
        assert runs.same(runs.weights(summary.last), runs.weights(folder / "checkpoints/step_000006"))


@pytest.mark.parametrize("whole", ["segmentation"], indirect=True)
def test_what_is_recomputed_changes_nothing(whole, tmp_path):
    config, folder, _ = whole
    summary = runs.trainer(config.replace(checkpointing=[0, 2], schedule={"steps": 6}), tmp_path / "run").run()
    assert runs.same(runs.weights(summary.last), runs.weights(folder / "checkpoints/step_000006"))


# Stopping


def stop_at(trainer: Trainer, step: int, number: int = signal.SIGTERM) -> None:
    fetch = trainer._fetch

    def signalled(batches):
        if trainer.step == step:
            os.kill(os.getpid(), number)
        return fetch(batches)

    trainer._fetch = signalled


@pytest.mark.parametrize("whole", ["referring"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_auto_goes_on(whole, tmp_path, number):
    config, folder, _ = whole
    trainer = runs.trainer(config, tmp_path / "run")
    stop_at(trainer, 1, number)
    before = signal.getsignal(number)
    summary = trainer.run()
    assert (summary.step, summary.stopped, summary.last.name) == (2, True, "step_000002")
    assert signal.getsignal(number) is before
    summary = runs.trainer(config, tmp_path / "run", resume="auto").run()
    assert (summary.step, summary.stopped) == (6, False)
    assert runs.same(runs.weights(summary.last), runs.weights(folder / "checkpoints" / "step_000006"))
    assert [entry["step"] for entry in runs.entries(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 6]


def test_a_signal_breaks_off_an_evaluation_which_is_made_up_for(data, tmp_path):
    config = runs.tiny("segmentation", data, schedule={"steps": 2})
    trainer = runs.trainer(config, tmp_path / "run")
    load = trainer.val_data.load

    def signalled(index):
        os.kill(os.getpid(), signal.SIGTERM)
        return load(index)

    trainer.val_data.load = signalled
    summary = trainer.run()
    assert (summary.step, summary.stopped, summary.best) == (2, True, None)
    summary = runs.trainer(config, tmp_path / "run", resume="auto").run()
    assert (summary.step, summary.stopped, summary.metric[0]) == (2, False, "mIoU")
    assert summary.best is not None
    again = runs.trainer(config, tmp_path / "run", resume="auto").run()
    assert again.metric == summary.metric
    assert len([entry for entry in runs.entries(tmp_path / "run") if "evaluation" in entry]) == 1


def test_the_best_model_stays(data, tmp_path, monkeypatch):
    import vpd_fast.evaluation

    values = iter([0.3, 0.5, 0.4, float("nan")])

    class Result:
        def __init__(self):
            self.metrics = {"mIoU": next(values)}

    monkeypatch.setattr(vpd_fast.evaluation, "evaluate", lambda *args, **options: Result())
    config = runs.tiny("segmentation", data, schedule={"steps": 4}, evaluation={"every_steps": 1})
    summary = runs.trainer(config, tmp_path / "run").run()
    assert summary.metric == ("mIoU", 0.5)
    store = summary.last.parent
    assert runs.same(runs.weights(summary.best), runs.weights(store / "step_000002"))
    assert not runs.same(runs.weights(summary.best), runs.weights(store / "step_000004"))
    assert json.loads((store / "index.json").read_text())["best"] == {"step": 2, "metric": "mIoU", "value": 0.5}
    assert json.loads((summary.best / "metrics.json").read_text()) == {"step": 2, "mIoU": 0.5}


def test_evaluation_does_not_change_training(data, tmp_path):
    config = runs.tiny("segmentation", data, schedule={"steps": 3})
    often = runs.trainer(config.replace(evaluation={"every_steps": 1}), tmp_path / "often").run()
    never = runs.trainer(config.replace(data={"val_split": None}), tmp_path / "never").run()
    assert runs.same(runs.weights(often.last), runs.weights(never.last))


def test_evaluations_by_epochs(data):
    """Four samples in batches of two: two steps are an epoch."""
    config = runs.tiny("segmentation", data, schedule={"epochs": 5, "steps": None}, evaluation={"every_epochs": 2})
    trainer = runs.trainer(config, None)
    assert trainer.steps == 10
    assert [step for step in range(1, 11) if trainer._evaluation_due(step)] == [4, 8, 10]


# What goes wrong


def break_loss(monkeypatch, bad: set[int]) -> None:
    calls = iter(range(1000))
    loss = Task.loss

    def broken(self, model, inputs):
        value = loss(self, model, inputs)
        return value * float("nan") if next(calls) in bad else value

    monkeypatch.setattr(Task, "loss", broken)


def test_a_step_that_is_not_finite_is_skipped(data, tmp_path, monkeypatch, capfd):
    config = runs.tiny("segmentation", data, data={"val_split": None}, checkpoints={"every_steps": 1})
    break_loss(monkeypatch, {2})
    trainer = runs.trainer(config, tmp_path / "run")
    summary = trainer.run()
    assert (summary.step, summary.skipped_steps) == (6, 1)
    store = summary.last.parent
    assert runs.same(runs.weights(store / "step_000002"), runs.weights(store / "step_000003"))
    assert not runs.same(runs.weights(store / "step_000003"), runs.weights(store / "step_000004"))
    assert "step 3: loss nan or its gradient is not finite, the step is skipped" in capfd.readouterr().err
    assert all(bool(buffer.isfinite().all()) for buffer in batch_norm_buffers(trainer.model))


def test_too_many_such_steps_end_the_run(data, tmp_path, monkeypatch):
    config = runs.tiny("segmentation", data, max_nan_steps=1, checkpoints={"every_steps": 1})
    break_loss(monkeypatch, {1, 3, 4})
    with pytest.raises(
        TrainingError, match=r"step 5: 2 steps in a row .*max_nan_steps=1; the last checkpoint is .*04$"
    ):
        runs.trainer(config, tmp_path / "run").run()
    assert VPD.from_pretrained(tmp_path / "run/checkpoints/step_000004").config.task == "segmentation"


def test_broken_images_are_skipped_or_end_the_run(data, tmp_path, capfd):
    shutil.copytree(data / "segmentation", tmp_path / "segmentation")
    broken = tmp_path / "segmentation/images/training/ADE_train_00000002.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    config = runs.tiny("segmentation", tmp_path, data={"val_split": None}, schedule={"steps": 4})
    assert runs.trainer(config, tmp_path / "run").run().step == 4
    assert "skipped: " in capfd.readouterr().err
    assert runs.entries(tmp_path / "run")[-1]["skipped"] >= 1
    with pytest.raises((DatasetError, ValueError), match="00000002"):
        runs.trainer(config.replace(data={"on_error": "raise"}), tmp_path / "strict").run()
    # The steps before it are not lost.
    steps = [path.name for path in (tmp_path / "strict").glob("checkpoints/step_*")]
    assert steps == ["step_000001"] or steps == []


@pytest.mark.parametrize("whole", ["segmentation"], indirect=True)
def test_folders_that_do_not_fit(whole, tmp_path):
    config, folder, _ = whole
    with pytest.raises(InputError, match="is not empty; --resume auto"):
        runs.trainer(config, folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    with pytest.raises(InputError, match="is not empty and holds no run"):
        runs.trainer(config, tmp_path / "other", resume="auto")
    with pytest.raises(InputError, match="expected a new folder"):
        runs.trainer(config, tmp_path / "other", resume=folder / "checkpoints/step_000003")
    with pytest.raises(InputError, match="would mix two runs"):
        runs.trainer(config, folder, resume=folder / "checkpoints/step_000003")
    with pytest.raises(InputError, match="which is none"):
        runs.trainer(config, tmp_path / "new", resume="step_000003")
    with pytest.raises(CheckpointError, match="is not a checkpoint to resume from"):
        runs.trainer(config, tmp_path / "new", resume=folder / "best")
    with pytest.raises(InputError, match="is a file"):
        runs.trainer(config, tmp_path / "other/file")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("whole", ["segmentation"], indirect=True)
def test_resuming_with_another_configuration(whole, tmp_path):
    config, folder, _ = whole
    begin = folder / "checkpoints/step_000003"
    changed = config.replace(optimizer={"lr": 0.5}, seed=3, log={"every": 2})
    with pytest.raises(InputError) as raised:
        runs.trainer(changed, tmp_path / "run", resume=begin)
    message = str(raised.value)
    assert "optimizer.lr is 0.5, was 0.001; seed is 3, was 0" in message
    assert "log" not in message
    shutil.copytree(Path(config.data.root), tmp_path / "segmentation")
    for kind, ending in (("images", "jpg"), ("annotations", "png")):
        (tmp_path / f"segmentation/{kind}/training/ADE_train_00000003.{ending}").unlink()
    fewer = config.replace(data={"root": str(tmp_path / "segmentation")})
    with pytest.raises(InputError, match="samples is 3, was 4"):
        runs.trainer(fewer, tmp_path / "run", resume=begin)
    free = config.replace(data={"workers": 1}, log={"every": 2}, checkpoints={"keep": 1}, max_nan_steps=3)
    summary = runs.trainer(free, tmp_path / "run", resume=begin).run()
    assert runs.same(runs.weights(summary.last), runs.weights(folder / "checkpoints/step_000006"))


def test_too_few_samples(data):
    with pytest.raises(InputError, match="4 samples do not fill a batch of 5"):
        runs.trainer(runs.tiny("segmentation", data, batch_size=5), None)


def test_a_data_set_of_another_task(data):
    config = runs.tiny("depth", data).replace(task="referring")
    with pytest.raises(InputError, match="data.kind nyu is for depth, the configuration's task is referring"):
        runs.trainer(config.replace(data={"size": 64}), None)


# Pictures and TensorBoard


def test_tensorboard_has_scalars_and_pictures(data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for task in runs.TASKS:
        config = runs.tiny(task, data, schedule={"steps": 1}, log={"tensorboard": True, "pictures": 1})
        runs.trainer(config, tmp_path / task).run()
        events = EventAccumulator(str(tmp_path / task / "tensorboard"))
        events.Reload()
        assert {"train/loss", "train/lr"} <= set(events.Tags()["scalars"])
        assert any(tag.startswith("evaluation/") for tag in events.Tags()["scalars"])
        assert events.Tags()["images"] == ["samples/0"]


# Where weights come from


def test_own_classes_from_a_checkpoint_of_others(data, tmp_path):
    """Layers that depend on the number of classes begin anew, all else is the checkpoint's."""
    old = runs.trainer(runs.tiny("segmentation", data), None).model
    old.save_pretrained(tmp_path / "old")
    root = miniature.folder(tmp_path / "own", "segmentation")
    for path in root.glob("masks/*/*.png"):
        cv2.imwrite(str(path), cv2.imread(str(path), cv2.IMREAD_UNCHANGED) % 3)
    (root / "classes.txt").write_text("a\nb\nc")
    embeddings = tmp_path / "embeddings.safetensors"
    save_file({"embeddings": torch.ones(3, 64)}, embeddings)
    config = runs.tiny(
        "segmentation", data,
        init={"random": None, "checkpoint": str(tmp_path / "old"), "class_embeddings": str(embeddings)},
        data={"kind": "folder", "root": str(root), "train_split": "train", "val_split": "val", "options": None},
    )  # fmt: skip
    trainer = runs.trainer(config, None)
    model = trainer.model
    assert (model.config.num_classes, model.config.class_names) == (3, ("a", "b", "c"))
    assert torch.equal(model.class_embeddings, torch.ones(3, 64))
    before, after = old.state_dict(), model.state_dict()
    kept = {key for key in after if before[key].shape == after[key].shape and torch.equal(before[key], after[key])}
    anew = set(after) - kept
    assert {"class_embeddings", "decode_head.conv_seg.weight", "decode_head.conv_seg.bias"} <= anew
    assert all(key.startswith(("class_embeddings", "decode_head.conv_seg", "neck.lateral_convs")) for key in anew)
    assert any("other classes than in" in note for note in trainer.notes)
    assert trainer.try_batch() > 0
