"""Workers for Ray Data: batches in, results and errors out; and one job through Ray itself."""

from __future__ import annotations

import contextlib
import functools
import os
import signal

import numpy as np
import pytest
from PIL import Image

from vpd_fast import VPD, VPDConfig, optimize
from vpd_fast.errors import InputError, MissingDependencyError
from vpd_fast.inference.ray import Predictor, predict_dataset
from vpd_fast.models.random_weights import randomize

from ..helpers.backbones import TINY

SIZES = [(70, 100), (64, 64), (90, 65)]


def small(task: str) -> VPD:
    config = VPDConfig(task=task, num_classes=5, num_scenes=3, tokens=8, channels=32, base_size=64, backbone=TINY)
    return randomize(VPD.empty(config), 1)


def pictures() -> np.ndarray:
    generator = np.random.default_rng(0)
    column = np.empty(len(SIZES), object)
    column[:] = [generator.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]
    return column


@pytest.fixture
def paths(tmp_path) -> list[str]:
    found = []
    for i, image in enumerate(pictures()):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        found.append(str(tmp_path / f"{i}.png"))
    (tmp_path / "broken.png").write_bytes(b"no image")
    return [*found, str(tmp_path / "broken.png")]


@pytest.mark.parametrize(
    ("task", "column", "dtype"), [("segmentation", "labels", np.int64), ("depth", "depth", np.float32)]
)
def test_results_are_those_of_predict(task, column, dtype, paths) -> None:
    found = Predictor(model=functools.partial(small, task), device="cpu")({"path": np.array(paths), "id": np.arange(4)})
    assert found.keys() == {"path", "id", column, "error"}
    model = small(task).eval()
    for i, path in enumerate(paths[:3]):
        expected = getattr(model.predict(path), column)
        assert found[column][i].dtype == dtype
        np.testing.assert_array_equal(found[column][i], expected)
        assert found["error"][i] == ""
    assert found[column][3].shape == (0, 0)
    assert "broken.png: cannot read the image" in found["error"][3]


def test_arrays_sentences_and_single_images() -> None:
    import torch

    tokens = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(3))
    predictor = Predictor(model=functools.partial(small, "referring"), device="cpu", text=["a", "b"], tokens=tokens)
    batch = {"image": pictures()[:1], "path": np.array(["x"])}
    found = predictor(batch)
    assert found.keys() == {"path", "masks", "error"}
    expected = small("referring").eval().predict(batch["image"][0], text=["a", "b"], tokens=tokens).masks
    np.testing.assert_array_equal(found["masks"][0], expected)
    assert expected.shape == (2, *SIZES[0])


def test_fast_models_and_files(tmp_path) -> None:
    optimize(small("depth").eval(), "fp32").save(tmp_path / "engine")
    small("depth").save_pretrained(tmp_path / "plain")
    batch = {"image": pictures()}
    plain = Predictor(tmp_path / "plain", device="cpu", flip=False)(batch)["depth"]
    for fast in (Predictor(tmp_path / "engine", device="cpu", flip=False),
                 Predictor(tmp_path / "plain", precision="fp32", device="cpu", flip=False)):  # fmt: skip
        assert fast.model.precision == "fp32"
        for found, expected in zip(fast(batch)["depth"], plain, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_wrong_use(monkeypatch, tmp_path) -> None:
    with pytest.raises(InputError, match="either a checkpoint or a function"):
        Predictor()
    with pytest.raises(InputError, match="segmentation has no option text"):
        Predictor(model=functools.partial(small, "segmentation"), device="cpu", text=["a"])
    predictor = Predictor(model=functools.partial(small, "segmentation"), device="cpu")
    with pytest.raises(InputError, match='needs a column "image" or "path", got bytes'):
        predictor({"bytes": np.zeros(1)})
    monkeypatch.setitem(__import__("sys").modules, "ray.data", None)
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"vpd_fast\[ray\]"):
        predict_dataset(["a.jpg"], tmp_path)


def test_a_job(tmp_path, paths) -> None:
    """Through Ray itself, two workers, one of which is killed while it predicts: every row is there once, of different
    sizes, one of them failed."""
    ray = pytest.importorskip("ray")
    small("segmentation").save_pretrained(tmp_path / "model")
    folder, killed = str(tmp_path / "model"), str(tmp_path / "killed")

    def make() -> VPD:
        model = VPD.from_pretrained(folder)
        encode = model.encode

        def encode_or_die(images):
            with contextlib.suppress(FileExistsError):
                os.close(os.open(killed, os.O_CREAT | os.O_EXCL))  # only the first of all workers
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(images)

        model.encode = encode_or_die
        return model

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = predict_dataset(
            paths, None, model=make, workers=2, batch_size=1, forward_batch=2, num_cpus=1, device="cpu"
        ).take_all()
    finally:
        ray.shutdown()
    assert os.path.exists(killed)
    assert sorted(row["path"] for row in rows) == sorted(paths)
    found = {row["path"]: row for row in rows}
    model = VPD.from_pretrained(folder)
    for path in paths[:3]:
        np.testing.assert_array_equal(found[path]["labels"], model.predict(path).labels)
    assert found[paths[3]]["error"]


def test_whatever_a_decoder_raises_is_the_error_of_its_image(paths, monkeypatch) -> None:
    from vpd_fast.inference import predict_images

    actual = predict_images.read_image
    monkeypatch.setattr(predict_images, "read_image", lambda source: 1 // 0 if "1.png" in source else actual(source))
    found = Predictor(model=functools.partial(small, "segmentation"), device="cpu")({"path": np.array(paths[:3])})
    assert [error == "" for error in found["error"]] == [True, False, True]
    assert found["error"][1] == f"{paths[1]}: cannot be read (ZeroDivisionError: integer division or modulo by zero)"
    assert found["labels"][1].shape == (0, 0)
