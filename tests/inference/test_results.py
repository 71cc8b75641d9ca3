"""What is saved can be read back, nothing half-written stays behind, and the pictures show what they should."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from vpd_fast.errors import ImageError, InputError
from vpd_fast.inference import (
    DepthResult,
    ReferringResult,
    SegmentationResult,
    heatmap_grid,
    heatmap_overlay,
    save_png,
)
from vpd_fast.inference.results import depth_scale
from vpd_fast.pictures.palette import palette

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)


def names(count: int) -> tuple[str, ...]:
    return tuple(f"class {i}" for i in range(count))


def test_labels_are_a_palette_png(tmp_path: Path) -> None:
    labels = RNG.integers(0, 256, (40, 60))
    assert SegmentationResult(PHOTO, labels, names(256)).save(tmp_path / "a.png") == [tmp_path / "a.png"]
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), labels)
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), palette(256)[labels])


def test_more_than_256_classes_are_16_bit_grey(tmp_path: Path) -> None:
    labels = RNG.integers(0, 1000, (40, 60))
    SegmentationResult(PHOTO, labels, names(1000)).save(str(tmp_path / "a.png"))
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "a.png"), cv2.IMREAD_UNCHANGED), labels)
    with pytest.raises(InputError, match="70000 classes"):
        SegmentationResult(PHOTO, labels, names(70_000)).save(tmp_path / "b.png")


def test_depth_is_16_bit_millimetres(tmp_path: Path) -> None:
    depth = np.array([[0.0004, 0.0006, 1.2344], [9.9999, 65.535, -0.1]], np.float32)
    result = DepthResult(PHOTO[:2, :3], depth, 65.535)
    result.save(tmp_path / "a.png")
    read = cv2.imread(str(tmp_path / "a.png"), cv2.IMREAD_UNCHANGED)
    assert read.dtype == np.uint16
    np.testing.assert_array_equal(read, [[0, 1, 1234], [10_000, 65_535, 0]])
    assert result.record()["depth_scale"] == 1000
    with pytest.raises(ImageError, match="NaN"):
        DepthResult(PHOTO, np.full((2, 2), np.nan, np.float32), 10.0).save(tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


@pytest.mark.parametrize(
    ("max_depth", "scale"),
    [(10.0, 1000), (65.535, 1000), (65.54, 256), (80.0, 256), (255.9, 256), (300.0, 128), (1e6, 1 / 16)],
)
def test_depths_beyond_16_bit_millimetres_are_not_clipped(tmp_path: Path, max_depth: float, scale: float) -> None:
    depth = np.array([[0.0, 0.3 * max_depth, max_depth]], np.float32)
    result = DepthResult(PHOTO[:1, :3], depth, max_depth)
    result.save(tmp_path / "a.png")
    read = cv2.imread(str(tmp_path / "a.png"), cv2.IMREAD_UNCHANGED)
    assert result.record()["depth_scale"] == scale == depth_scale(max_depth)
    # Half a level, and float32's rounding of up to 2^16 levels, 2^-8.
    np.testing.assert_allclose(read / scale, depth, rtol=0, atol=(0.5 + 2**-8) / scale)
    # Whoever makes a result of other depths than its max_depth loses nothing either.
    assert DepthResult(PHOTO[:1, :3], depth, 1.0).scale == scale


def test_masks_are_black_and_white_and_numbered(tmp_path: Path) -> None:
    masks = RNG.random((2, 40, 60)) > 0.5
    paths = ReferringResult(PHOTO, masks, ("one", "two")).save(tmp_path / "a.png")
    assert paths == [tmp_path / "a_1.png", tmp_path / "a_2.png"]
    for path, mask in zip(paths, masks, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), mask * 255)
    assert ReferringResult(PHOTO, masks[:1], ("one",)).save(tmp_path / "b.png") == [tmp_path / "b.png"]


def test_unwritable_places_are_named_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(PHOTO)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ImageError, match="a.png: cannot write the image"):
        save_png(image, tmp_path / "file" / "a.png")
    with pytest.raises(ImageError, match=r"ends in \.png"):
        save_png(image, tmp_path / "a.jpg")

    save_png(image, tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def full_disk(self: Path, data: bytes) -> None:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(ImageError, match="No space left on device"):
        save_png(image, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "file"]


def test_palette_colours_differ_and_do_not_depend_on_the_count() -> None:
    colours = palette(150)
    np.testing.assert_array_equal(colours[:20], palette(20))
    distances = np.abs(colours[:, None].astype(int) - colours[None]).sum(2)
    assert distances[~np.eye(150, dtype=bool)].min() > 20
    assert distances[:20, :20][~np.eye(20, dtype=bool)].min() > 60
    np.testing.assert_array_equal(palette(300)[256:], palette(44))


def test_shares_are_sorted_and_add_up() -> None:
    labels = np.array([[2, 2, 2, 0], [2, 2, 0, 4]])
    shares = SegmentationResult(PHOTO, labels, names(6)).shares()
    assert shares == {"class 2": 0.625, "class 0": 0.25, "class 4": 0.125}


def test_segmentation_overlay_shows_the_classes_colours() -> None:
    labels = np.zeros((400, 600), np.int64)
    labels[:, 300:] = 7
    grey = np.full((400, 600, 3), 128, np.uint8)
    picture = np.asarray(SegmentationResult(grey, labels, names(10)).overlay()).astype(int)
    assert picture.shape[1] > 600  # a legend was added
    for x, label in ((20, 0), (580, 7)):
        expected = 0.45 * 128 + 0.55 * palette(10)[label].astype(float)
        np.testing.assert_allclose(picture[380, x], expected, atol=1)
    for label in (0, 7):  # swatches
        assert (picture[:, 600:] == palette(10)[label]).all(2).sum() > 100


def test_referring_overlay_darkens_the_rest_and_adds_the_sentence() -> None:
    mask = np.zeros((1, 400, 600), bool)
    mask[:, 100:300, 100:300] = True
    photo = np.full((400, 600, 3), 200, np.uint8)
    picture = np.asarray(ReferringResult(photo, mask, ("the left half",)).overlay()).astype(int)
    np.testing.assert_allclose(picture[50, 500], [100] * 3, atol=1)
    np.testing.assert_allclose(picture[200, 200], 0.6 * 200 + 0.4 * palette(1)[0].astype(float), atol=1)
    assert picture.shape[0] > 400
    longer = ReferringResult(photo, mask, ("a long sentence that goes on " * 8,)).overlay()
    assert longer.height > picture.shape[0]  # wrapped
    assert longer.width == picture.shape[1]


def test_depth_overlay_is_bright_where_near() -> None:
    depth = np.linspace(1, 9, 480, dtype=np.float32)[:, None].repeat(300, 1)
    picture = np.asarray(DepthResult(np.zeros((480, 300, 3), np.uint8), depth, 10.0).overlay()).astype(int)
    coloured = picture[:, picture.shape[1] // 2 : picture.shape[1] // 2 + 100].sum(2).mean(1)
    assert coloured[5] > 400
    assert coloured[200:360].mean() < coloured[5]
    assert coloured[475] < 60


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (63, 65), (3000, 20)])
def test_every_overlay_of_every_shape(size: tuple[int, int]) -> None:
    photo = RNG.random((*size, 3)).astype(np.float32)
    results = [
        SegmentationResult(photo, RNG.integers(0, 150, size), names(150)),
        ReferringResult(photo, RNG.random((2, *size)) > 0.5, ("one", "two " * 60)),
        DepthResult(photo, np.full(size, 2.5, np.float32), 10.0),
        DepthResult(photo, RNG.random(size).astype(np.float32) * 10, 10.0),
    ]
    for result in results:
        picture = result.overlay()
        assert picture.mode == "RGB"
        assert max(picture.size) < 4000


def test_heat_maps_point_at_the_hottest_place() -> None:
    heat = np.zeros((400, 600), np.float32)
    heat[:100, :100] = 0.3
    photo = np.full((400, 600, 3), 128, np.uint8)
    plain = np.asarray(heatmap_overlay(photo, heat)).astype(int)
    assert plain.shape == (400, 600, 3)
    hot, cold = plain[50, 50], plain[300, 500]
    assert hot[0] > hot[2] + 60  # red
    assert np.ptp(cold) < 40  # nearly grey
    assert heatmap_overlay(photo, heat, "dog").height > 400
    assert heatmap_overlay(photo, np.zeros((400, 600), np.float32), "nothing").width == 600


def test_heat_map_grids_hold_the_photo_and_each_map() -> None:
    photo = np.full((40, 60, 3), 128, np.uint8)
    maps = {f"class {i}": RNG.random((40, 60)).astype(np.float32) for i in range(5)}
    one = heatmap_grid(photo, maps, ["class 1"])
    five = heatmap_grid(photo, maps, list(maps))
    assert one.width > one.height
    assert five.width <= 2048
    tile = five.width // 3
    corner = np.asarray(five)[50:100, :tile].astype(int)
    assert (corner == 128).all(2).mean() > 0.9  # the photo comes first
