"""Masks come out as the numbers that are stored, whatever their bit depth, and never as what they look like."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from vpd_fast.errors import ImageError
from vpd_fast.pictures import pillow_limits
from vpd_fast.pictures.masks import read_mask

RNG = np.random.default_rng(0)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def grey_png(path: Path, values: np.ndarray, bits: int) -> Path:
    """Write grey of 1, 2 or 4 bits, which Pillow does not write."""
    rows = b""
    for row in values:
        packed = np.unpackbits(row[:, None], axis=1)[:, 8 - bits :].ravel()
        rows += b"\0" + np.packbits(packed).tobytes()
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    parts = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    return path


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_of_few_bits_is_not_spread(tmp_path, bits):
    values = RNG.integers(0, 2**bits, (5, 11), np.uint8)
    np.testing.assert_array_equal(read_mask(grey_png(tmp_path / "a.png", values, bits)), values)


@pytest.mark.parametrize(
    ("ending", "dtype", "high"),
    [
        ("png", bool, 2), ("tif", bool, 2), ("bmp", bool, 2), ("pbm", bool, 2),
        ("png", np.uint8, 256), ("tif", np.uint8, 256), ("bmp", np.uint8, 256),
        ("pgm", np.uint8, 256), ("png", np.uint16, 65536), ("tif", np.uint16, 65536), ("pgm", np.uint16, 65536),
        ("tif", np.int32, 2**31 - 1),
    ],
)  # fmt: skip
def test_stored_numbers_of_every_format(tmp_path, ending, dtype, high):
    values = RNG.integers(0, high, (7, 9)).astype(dtype)
    path = tmp_path / f"a.{ending}"
    Image.fromarray(values).save(path)
    mask = read_mask(path)
    np.testing.assert_array_equal(mask, values)
    assert np.issubdtype(mask.dtype, np.integer)


@pytest.mark.parametrize("compression", [None, "group4", "tiff_lzw"])
def test_boolean_tiff(tmp_path, compression):
    values = RNG.integers(0, 2, (7, 9)).astype(bool)
    Image.fromarray(values).save(tmp_path / "a.tif", compression=compression)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.tif"), values)


@pytest.mark.parametrize("colours", [2, 4, 16, 256])  # Pillow stores them in 1, 2, 4 and 8 bits
@pytest.mark.parametrize("ending", ["png", "bmp", "tif"])
def test_a_palette_gives_its_indices(tmp_path, colours, ending):
    values = RNG.integers(0, colours, (7, 9), np.uint8)
    values[0, 0] = colours - 1
    image = Image.frombytes("P", values.shape[::-1], values.tobytes())
    image.putpalette(RNG.integers(0, 256, 3 * colours, np.uint8).tobytes())
    image.save(tmp_path / f"a.{ending}")
    np.testing.assert_array_equal(read_mask(tmp_path / f"a.{ending}"), values)


@pytest.mark.parametrize("maximum", [1, 2, 150, 254, 256, 1000, 65534])
@pytest.mark.parametrize("plain", [False, True])
def test_the_maximum_of_a_pgm_does_not_spread_numbers(tmp_path, maximum, plain):
    values = np.unique(RNG.integers(0, maximum + 1, 60))[None]
    if plain:
        data = " ".join(map(str, values[0])).encode()
    else:
        data = values.astype(np.uint8 if maximum < 256 else ">u2").tobytes()
    head = f"{'P2' if plain else 'P5'}\n{values.shape[1]} 1\n{maximum}\n".encode()
    (tmp_path / "a.pgm").write_bytes(head + data + b"\n" * plain)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.pgm"), values)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("alpha", [False, True])
def test_colours_are_refused_unless_they_are_equal(tmp_path, dtype, alpha):
    values = RNG.integers(0, 150, (7, 9)).astype(dtype)
    channels = [values] * 3 + [np.full_like(values, np.iinfo(dtype).max)] * alpha
    cv2.imwrite(str(tmp_path / "a.png"), np.stack(channels, -1))
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), values)
    channels[1] = np.where(np.arange(9) == 4, values + 1, values).astype(dtype)
    cv2.imwrite(str(tmp_path / "b.png"), np.stack(channels, -1))
    with pytest.raises(ImageError, match=r"b.png: a mask of mode RGBA? whose channels differ; expected one channel"):
        read_mask(tmp_path / "b.png")


def test_grey_with_alpha(tmp_path):
    values = RNG.integers(0, 150, (7, 9), np.uint8)
    alpha = np.full_like(values, 255)
    Image.fromarray(np.stack([values, alpha], -1)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), values)
    alpha[3, 3] = 0
    Image.fromarray(np.stack([values, alpha], -1)).save(tmp_path / "b.png")
    with pytest.raises(ImageError, match=r"b.png: a mask with transparent pixels"):
        read_mask(tmp_path / "b.png")


def test_what_does_not_keep_numbers_is_refused(tmp_path):
    Image.fromarray(RNG.integers(0, 5, (16, 16), np.uint8)).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").rename(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"a.png: JPEG may change numbers"):
        read_mask(tmp_path / "a.png")
    Image.fromarray(RNG.integers(0, 5, (16, 16), np.uint8)).save(tmp_path / "a.gif")
    with pytest.raises(ImageError, match=r"a.gif: GIF may change numbers"):
        read_mask(tmp_path / "a.gif")
    Image.fromarray(RNG.random((4, 4)).astype(np.float32)).save(tmp_path / "b.tif")
    with pytest.raises(ImageError, match=r"b.tif: a mask of mode F; expected one channel of integers"):
        read_mask(tmp_path / "b.tif")
    Image.fromarray(RNG.integers(0, 5, (4, 4), np.uint8)).save(tmp_path / "c.tif", tiffinfo={262: 0})
    with pytest.raises(ImageError, match=r"c.tif: a TIFF in which 0 is white"):
        read_mask(tmp_path / "c.tif")
    (tmp_path / "d.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(ImageError, match=r"d.png"):
        read_mask(tmp_path / "d.png")
    with pytest.raises(ImageError, match=r"e.png: cannot read the mask, the path does not exist"):
        read_mask(tmp_path / "e.png")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", ["P", "L", "1"])
def test_masks_have_the_limit_of_images(tmp_path, monkeypatch, mode):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # as small for 80 x 80 as Pillow's is for 16384 x 16384
    image = Image.new(mode, (80, 80), 1)
    image.save(tmp_path / "a.png")
    assert read_mask(tmp_path / "a.png").min() == 1
    assert Image.MAX_IMAGE_PIXELS == 100
    monkeypatch.setattr(pillow_limits, "MAX_PIXELS", 1000)
    monkeypatch.setattr("vpd_fast.pictures.decoding.MAX_PIXELS", 1000)
    with pytest.raises(ImageError, match="80x80 pixels are too many; the limit is 1000"):
        read_mask(tmp_path / "a.png")


def test_a_name_that_is_not_utf8(tmp_path):
    import os

    Image.new("L", (4, 4), 3).save(tmp_path / "a.png")
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    os.rename(tmp_path / "a.png", path)
    assert read_mask(path).tolist() == [[3] * 4] * 4
    path.write_bytes(b"broken")
    with pytest.raises(ImageError, match=r"caf.udce9.png: cannot read the mask") as raised:
        read_mask(path)
    str(raised.value).encode("utf-8")
