"""Images of every kind come out as the RGB a person sees, and broken ones as one clear error."""

from __future__ import annotations

import io
import threading
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from vpd_fast.errors import ImageError, InputError
from vpd_fast.pictures.reading import MAX_PIXELS, read_image, to_tensor
from vpd_fast.pictures.resizing import fit_size, resize_antialiased, resize_bilinear

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RGB[..., 0]


def test_files_pil_images_arrays_and_tensors_agree(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    floats = RGB.astype(np.float32) / 255
    for source in (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        Image.fromarray(RGB),
        RGB,
        torch.from_numpy(RGB.transpose(2, 0, 1)),
    ):
        image = read_image(source)
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image, RGB)
    for source in (
        floats,
        floats.astype(np.float64),
        torch.from_numpy(floats).permute(2, 0, 1),
        RGB.astype(np.uint16) * 257,
    ):
        image = read_image(source)
        assert image.dtype == np.float32
        np.testing.assert_allclose(image, floats, atol=1e-6)


def test_grey_becomes_three_equal_channels() -> None:
    expected = np.repeat(GREY[..., None], 3, 2)
    for source in (GREY, GREY[..., None], torch.from_numpy(GREY)[None], Image.fromarray(GREY)):
        np.testing.assert_array_equal(read_image(source), expected)


def test_sixteen_bit_grey_keeps_its_depth(tmp_path: Path) -> None:
    values = np.array([[0, 1, 300], [40000, 65534, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", Image.fromarray(values), Image.fromarray(values.astype(np.int32)), values):
        np.testing.assert_allclose(read_image(source)[..., 1], values / 65535, atol=1e-7)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGBa"])
def test_transparency_is_composited_on_white(mode: str) -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = (0, 255, 128)  # black: invisible, opaque, half
    image = Image.fromarray(rgba)
    if mode == "P":
        image = Image.fromarray(np.array([[0, 1, 1]], np.uint8), "P")
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.info["transparency"] = 0
        np.testing.assert_array_equal(read_image(image)[0, :, 0], [255, 0, 0])
        return
    np.testing.assert_array_equal(read_image(image.convert(mode))[0, :, 0], [255, 0, 127])
    if mode == "RGBA":
        np.testing.assert_array_equal(read_image(rgba)[0, :, 0], [255, 0, 127])
        np.testing.assert_allclose(read_image(rgba.astype(np.float32) / 255)[0, :, 0], [1, 0, 127 / 255], atol=1e-6)


@pytest.mark.parametrize("mode", ["1", "CMYK", "YCbCr", "HSV", "P"])
def test_other_modes_are_converted(mode: str) -> None:
    image = Image.fromarray(RGB).convert(mode)
    np.testing.assert_array_equal(read_image(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    turn = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), turn(RGB))


def test_a_malformed_exif_block_is_ignored(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=b"Exif\x00\x00garbage that is no TIFF header")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), RGB)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(read_image(tmp_path / "a.gif"), np.full((3, 4, 3), (255, 0, 0), np.uint8))


def _png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole, "JPEG")
    cases = {
        "empty.png": (b"", "file is empty"),
        "text.png": (b"no image", "no known image format"),
        "short.jpg": (whole.getvalue()[: len(whole.getvalue()) // 2], "truncated"),
        "huge.png": (_png_header(100_000, 100_000), f"limit is {MAX_PIXELS}"),
    }
    for name, (content, reason) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=f"{name}.*{reason}"):
            read_image(tmp_path / name)
    with pytest.raises(ImageError, match="does not exist"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="is a folder"):
        read_image(tmp_path)


@pytest.mark.filterwarnings("error")
def test_large_images_are_read_and_pillows_limit_is_left_alone(tmp_path: Path) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    Image.new("1", (10_000, 10_000), 1).save(tmp_path / "large.png")
    image = read_image(tmp_path / "large.png")
    assert image.shape == (10_000, 10_000, 3)
    assert image.min() == 255
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (np.zeros((0, 5, 3), np.uint8), "empty"),
        (np.zeros((5, 0), np.uint8), "empty"),
        (torch.zeros(3, 0, 4), "empty"),
        (np.zeros((5, 5, 2), np.uint8), r"\(5, 5, 2\)"),
        (np.zeros(5, np.uint8), r"\(5,\)"),
        (np.zeros((2, 5, 5, 3), np.uint8), r"\(2, 5, 5, 3\)"),
        (np.zeros((5, 5, 3), np.int64), "int64"),
        (np.zeros((5, 5, 3), bool), "bool"),
        (np.full((2, 2), np.nan), "NaN"),
        (np.array([[0.0, np.inf]]), "NaN or infinity"),
        (np.full((2, 2, 3), 255.0), "255"),
        (np.full((2, 2, 3), -1.0), "-1"),
        (torch.zeros(2, 3, 4, 4), r"\(2, 3, 4, 4\)"),
        (torch.zeros(4, 4, 3), r"\(4, 4, 3\)"),
        (torch.zeros(3, 4, 4, dtype=torch.int32), "int32"),
        (torch.full((3, 4, 4), float("nan")), "NaN"),
        (Image.fromarray(np.full((2, 2), 70_000, np.int32)), "70000"),
    ],
)
def test_bad_arrays_say_what_came_and_what_was_expected(source: object, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        read_image(source)


def test_other_types_are_an_input_error() -> None:
    with pytest.raises(InputError, match="int as an image; expected a file path"):
        read_image(42)


def test_reading_in_threads(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    results: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: results.append(read_image(tmp_path / "a.png"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all((result == RGB).all() for result in results)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 683), (512, 683)),
        ((1080, 1920), (512, 910)),
        ((1, 10_000), (1, 2048)),
        ((1, 1), (512, 512)),
        ((2048, 512), (2048, 512)),
        ((375, 500), (512, 683)),
    ],
)
def test_fit_size_rounds_as_mmcv(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert fit_size(*size, 512, 2048) == expected


def test_resizing() -> None:
    photo = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resize_bilinear(photo, (21, 17)), cv2.resize(photo, (17, 21)))
    expected = np.asarray(Image.fromarray(photo).resize((17, 21), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(resize_antialiased(photo, (21, 17)), expected)
    floats = resize_antialiased(photo.astype(np.float32) / 255, (21, 17))
    np.testing.assert_allclose(floats, expected / 255, atol=1.01 / 255)  # the 8-bit filter rounds twice
    np.testing.assert_allclose(to_tensor(photo)[0].permute(1, 2, 0), photo / 255, atol=1e-7)
