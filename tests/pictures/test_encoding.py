"""Encoded pictures are read back as they were, and what is drawn fast looks as what Pillow draws."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw

from vpd_fast.errors import ImageError
from vpd_fast.pictures import canvas, encoding
from vpd_fast.pictures.encoding import encode, encode_jpeg, encode_numbers, encode_png
from vpd_fast.pictures.palette import palette

RNG = np.random.default_rng(0)


def read(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.fixture(params=["isal", "zlib"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both libraries that compress, also where one is not installed."""
    if request.param == "zlib":
        monkeypatch.setattr(encoding, "_isal", lambda: None)
    else:
        assert encoding._isal() is not None


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("size", [(1, 1), (40, 61)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_numbers_are_kept(size: tuple[int, int], dtype: type) -> None:
    numbers = RNG.integers(0, np.iinfo(dtype).max, size, dtype, endpoint=True)
    data = encode_numbers(numbers)
    assert read(data).mode == ("L" if dtype is np.uint8 else "I;16")
    for found in (np.asarray(read(data)), cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)):
        np.testing.assert_array_equal(found, numbers)
    # Views and runs of equal numbers.
    np.testing.assert_array_equal(
        np.asarray(read(encode_numbers(np.repeat(numbers, 50, 0).T))), np.repeat(numbers, 50, 0).T
    )


@pytest.mark.usefixtures("library")
def test_palettes_are_kept() -> None:
    numbers = RNG.integers(0, 7, (9, 8), np.uint8)
    picture = read(encode_numbers(numbers, palette(7)))
    assert picture.mode == "P"
    np.testing.assert_array_equal(np.asarray(picture), numbers)
    np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), palette(7)[numbers])


def test_colours_are_kept() -> None:
    colours = RNG.integers(0, 256, (9, 8, 3), np.uint8)
    np.testing.assert_array_equal(np.asarray(read(encode_png(Image.fromarray(colours)))), colours)


def test_a_jpeg_keeps_sharp_colours() -> None:
    """As borders of classes and letters are: colours at half the resolution would smear them over two pixels."""
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2] = (230, 40, 160)
    picture = read(encode_jpeg(Image.fromarray(stripes)))
    assert picture.format == "JPEG"
    assert np.abs(np.asarray(picture).astype(int) - stripes).max() < 40


def test_the_ending_says_what_is_written() -> None:
    picture = Image.new("RGB", (4, 4))
    for name, kind in (("a.png", "PNG"), ("a.JPG", "JPEG")):
        assert read(encode(picture, Path(name))).format == kind
    with pytest.raises(ImageError, match=r"a\.gif: pictures are written as \.png or \.jpg, got the ending '\.gif'"):
        encode(picture, Path("a.gif"))


@pytest.mark.parametrize("anchor", ["lm", "mm", "rm"])
@pytest.mark.parametrize("stroke", [0, 2])
def test_letters_are_those_of_pillow(anchor: str, stroke: int) -> None:
    drawn, expected = Image.new("RGB", (200, 60), (9, 90, 200)), Image.new("RGB", (200, 60), (9, 90, 200))
    for _ in range(2):  # the second time from what was kept
        canvas.write(drawn, (100, 30), "Bücherregal, 5 %", (250, 240, 10), anchor=anchor, stroke=stroke)
        ImageDraw.Draw(expected).text(
            (100, 30), "Bücherregal, 5 %", (250, 240, 10), canvas.load_font(18), anchor=anchor, stroke_width=stroke
        )
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("count", [3, 256, 300, 1000])
def test_labels_have_the_palettes_colours(count: int) -> None:
    labels = RNG.integers(0, count, (50, 60))
    for dtype in (np.int64, np.uint16):
        np.testing.assert_array_equal(canvas.paint(labels.astype(dtype)), palette(count)[labels])


def test_names_lie_in_their_regions() -> None:
    """Also where they are looked for on a smaller map, and none where a region is too small for one."""
    labels = np.zeros((900, 1200), np.uint8)
    labels[:, 700:] = 1
    labels[:20, :20] = 2
    plain = np.full((900, 1200, 3), 128, np.uint8)
    picture = Image.fromarray(plain)
    canvas.name_regions(picture, labels, ["left", "right", "tiny"])
    ys, xs = np.nonzero((np.asarray(picture) != plain).any(2))
    left, right = xs[xs < 700], xs[xs >= 700]
    for found, middle in ((left, 350), (right, 950)):
        assert len(found) > 50
        assert np.ptp(found) < 80
        assert abs(found.mean() - middle) < 120
    assert ys.min() > 100
