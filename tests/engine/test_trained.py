"""What the fast models cost in accuracy, on models that have learnt something: the bundled miniatures.

The limits for int8 are 0.5 points of mIoU and 1 % of RMSE; fp8 has three bits behind the point and wider ones.
"""

from __future__ import annotations

import functools

import pytest
import torch

from vpd_fast import VPD, optimize
from vpd_fast.data.shapes import ShapesDataset
from vpd_fast.engine import Policy
from vpd_fast.evaluation import evaluate
from vpd_fast.models.text import TextEncoder

CASES = [("segmentation", 20), ("referring", 8), ("depth", 4)]  # (task, scenes)
CASES += [pytest.param(task, 60, marks=pytest.mark.slow) for task in ("segmentation", "referring", "depth")]
STATIC = "int8, static rows"  # attention and GEGLU round by scales of calibration images, computed by the references
LIMITS = {  # {precision: (points of mIoU, points of oIoU, relative RMSE)}: largest loss against fp32
    "fp32": (0.05, 0.05, 0.0005),
    "bf16": (0.3, 0.5, 0.005),
    "int8": (0.5, 1.0, 0.01),
    STATIC: (0.5, 1.0, 0.01),
    "fp8": (2.0, 3.0, 0.03),
}
OPTIONS = {"segmentation": {}, "referring": {}, "depth": {"crop": "none"}}


@functools.cache
def dataset(task: str, folder: str, scenes: int) -> ShapesDataset:
    return ShapesDataset(folder, "test", task=task, length=scenes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("shapes"))


def calibration(task: str, scenes: int = 16) -> list:
    """Scenes of the training split, for referring with a sentence each."""
    data, images = ShapesDataset(None, "train", task=task, length=scenes), []
    encoder, tokens = TextEncoder("shapes-text", remember=False), VPD.from_pretrained("shapes-referring").config.tokens
    for sample in map(data.load, range(scenes)):
        pixels = torch.from_numpy(sample.image.copy()).permute(2, 0, 1)[None] / 255
        pixels = pixels if task == "depth" else 2 * pixels - 1
        sentence = encoder.embed_sentences(sample.sentences[:1], tokens) if task == "referring" else None
        images.append(pixels if sentence is None else (pixels, sentence))
    return images


@functools.cache
def metrics(task: str, folder: str, precision: str | None, scenes: int) -> dict[str, float]:
    model = VPD.from_pretrained(f"shapes-{task}")
    if precision == STATIC:
        policy = Policy(winograd=False, static_rows=True, emulate=True)
        model = optimize(model, "int8", policy=policy, calibration=calibration(task))
    elif precision is not None:
        model = optimize(model, precision, policy=Policy(emulate=True) if precision == "fp8" else None)
    encoder = {"text_encoder": TextEncoder("shapes-text", remember=False)} if task == "referring" else {}
    return evaluate(model, dataset(task, folder, scenes), batch_size=4, worst=0, **OPTIONS[task], **encoder).metrics


# Twenty scenes are too few for the worst class of a segmentation to be worth its mean; tests/demo looks at a few.
@pytest.mark.parametrize(("task", "scenes"), CASES[1:])
def test_the_plain_models_have_learnt_their_task(task: str, folder: str, scenes: int) -> None:
    found = metrics(task, folder, None, scenes)
    least = {"segmentation": ("mIoU", 0.85), "referring": ("oIoU", 0.70), "depth": ("abs_rel", -0.08)}[task]
    assert (-1 if task == "depth" else 1) * found[least[0]] > least[1]


# fp32 agrees with the plain model in tests/engine/test_optimize.py; what it loses here is nothing.
@pytest.mark.parametrize(
    "precision", [pytest.param(p, marks=pytest.mark.slow) if p in ("fp8", "fp32", STATIC) else p for p in LIMITS]
)
@pytest.mark.parametrize(("task", "scenes"), CASES)
def test_loss_of_precision(task: str, precision: str, folder: str, scenes: int) -> None:
    plain, fast = metrics(task, folder, None, scenes), metrics(task, folder, precision, scenes)
    points_miou, points_oiou, relative = LIMITS[precision]
    if task == "depth":
        print(f"{task} {precision}: rmse {plain['rmse']:.4f} -> {fast['rmse']:.4f}")
        assert fast["rmse"] <= plain["rmse"] * (1 + relative)
    else:
        name, points = ("mIoU", points_miou) if task == "segmentation" else ("oIoU", points_oiou)
        print(f"{task} {precision}: {name} {plain[name]:.4f} -> {fast[name]:.4f}")
        assert fast[name] >= plain[name] - points / 100
