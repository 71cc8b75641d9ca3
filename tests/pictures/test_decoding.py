"""Whatever a decoder, a plug-in or the file system raises is an ImageError, and Pillow is left as it was."""

from __future__ import annotations

import os
import struct
import sys
import threading
import types
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from vpd_fast.errors import ImageError
from vpd_fast.pictures import pillow_limits
from vpd_fast.pictures.masks import read_mask
from vpd_fast.pictures.pillow_limits import MAX_METADATA, MAX_PIXELS
from vpd_fast.pictures.reading import read_image

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
LIMITS = (Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)


def _limits() -> tuple:
    return Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _with_chunk(path: Path, chunk: bytes, last: bool = False) -> Path:
    Image.fromarray(RGB[..., 0]).save(path)
    data = path.read_bytes()
    at = len(data) - 12 if last else 33
    path.write_bytes(data[:at] + chunk + data[at:])
    return path


@pytest.mark.parametrize("read", [read_image, read_mask])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "chunk",
    [
        _chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(3 << 20))),
        _chunk(b"zTXt", b"c\0\0" + zlib.compress(b"A" * (3 << 20))),
        _chunk(b"iTXt", b"c\0\1\0\0\0" + zlib.compress(b"A" * (3 << 20))),
        _chunk(b"zTXt", b"c\0\0" + zlib.compress(b"A" * (1 << 20))) * 80,
    ],
    ids=["profile", "text", "international", "many"],
)
def test_much_metadata_beside_good_pixels(tmp_path, read, chunk, last):
    pixels = read(_with_chunk(tmp_path / "a.png", chunk, last))
    np.testing.assert_array_equal(pixels if pixels.ndim == 2 else pixels[..., 0], RGB[..., 0])
    assert _limits() == LIMITS


def test_metadata_beyond_the_limit_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setitem(pillow_limits._LIMITS, (PngImagePlugin, "MAX_TEXT_CHUNK"), 1000)
    path = _with_chunk(tmp_path / "a.png", _chunk(b"zTXt", b"c\0\0" + zlib.compress(b"A" * 2000)))
    with pytest.raises(ImageError, match="a.png: cannot read the image .*MAX_TEXT_CHUNK"):
        read_image(path)
    assert _limits() == LIMITS


def test_limits_are_in_force_until_the_last_thread_is_done():
    inside, leave = threading.Event(), threading.Event()

    def read() -> None:
        with pillow_limits.pillow_limits():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=read)
    thread.start()
    inside.wait(10)
    with pillow_limits.pillow_limits():
        pass
    assert _limits() == (MAX_PIXELS, MAX_METADATA, MAX_METADATA)
    leave.set()
    thread.join()
    assert _limits() == LIMITS


def test_the_callers_warnings_are_left_alone():
    before = list(warnings.filters)
    with pillow_limits.pillow_limits(), warnings.catch_warnings():
        pass
    assert warnings.filters == before
    with warnings.catch_warnings():
        block = pillow_limits.pillow_limits()
        block.__enter__()
    assert list(warnings.filters) == before
    block.__exit__(None, None, None)
    assert list(warnings.filters) == before


@pytest.mark.parametrize("error", [ValueError, RuntimeError, struct.error, KeyError, RecursionError, zlib.error])
@pytest.mark.parametrize("read", [read_image, read_mask])
@pytest.mark.parametrize("when", ["open", "load"])
def test_whatever_a_decoder_raises_is_an_image_error(tmp_path, monkeypatch, error, read, when):
    Image.fromarray(RGB[..., 0]).save(tmp_path / "a.png")

    def fail(*_: object) -> None:
        raise error("out of order")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "_open" if when == "open" else "load_prepare", fail)
    with pytest.raises(ImageError, match="a.png: cannot read the (image|mask)") as raised:
        read(tmp_path / "a.png")
    assert "\n" not in str(raised.value)
    assert _limits() == LIMITS


@pytest.mark.parametrize("read", [read_image, read_mask])
def test_no_memory_is_told(tmp_path, monkeypatch, read):
    def fail(*_: object) -> None:
        raise MemoryError

    Image.fromarray(RGB[..., 0]).save(tmp_path / "a.png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", fail)
    with pytest.raises(ImageError, match=r"a.png.*not enough memory for an image of this size"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize(
    "head", [b"P6\n5 5\n0\n", b"P6\n5 5\n70000\n", b"P5\n-1 5\n255\n", b"Pf\n5 5\nnan\n", b"P6\n5 x\n1\n"]
)
def test_netpbm_files_with_wrong_headers(tmp_path, head):
    (tmp_path / "a.ppm").write_bytes(head + bytes(100))
    with pytest.raises(ImageError, match=r"a.ppm"):
        read_image(tmp_path / "a.ppm")


@pytest.mark.parametrize("name", ["a" * 300 + ".png", "b/" * 3000 + ".png", "a\0b.png"])
def test_paths_that_no_file_can_have(name):
    with pytest.raises(ImageError, match="cannot read the image") as raised:
        read_image(name)
    assert len(str(raised.value)) < 600


def test_no_other_program_is_run_for_an_image(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.eps")
    with pytest.raises(ImageError, match=r"a.eps.* of no known image format"):
        read_image(tmp_path / "a.eps")


def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ImageError, match="the path is no file"):
        read_image(tmp_path / "a.png")


def test_names_that_are_no_text(tmp_path):
    path = os.fsencode(tmp_path) + b"/m\xff\xfe.png"
    with open(path, "wb") as file:
        file.write(b"broken")
    with pytest.raises(ImageError, match=r"m.udcff.udcfe.png") as raised:
        read_image(os.fsdecode(path))
    str(raised.value).encode("utf-8")


def test_broken_pixels_of_a_turned_image_are_told(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg", exif=exif)
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=r"a.jpg.*truncated"):
        read_image(tmp_path / "a.jpg")


def test_orientation_is_applied_beside_tags_that_are_broken(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=exif)

    def fail(*_: object) -> bytes:
        raise struct.error("a tag of another type")

    monkeypatch.setattr(Image.Exif, "tobytes", fail)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), RGB[::-1, ::-1])
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", exif=False), RGB)


@pytest.mark.parametrize(
    ("brand", "reason"), [(b"heic", r"pip install pillow-heif"), (b"mif1", "HEIC"), (b"avis", "pillow-avif-plugin")]
)
def test_the_package_for_a_format_is_told_and_used(tmp_path, monkeypatch, brand, reason):
    for module in ("pillow_heif", "pillow_avif"):
        monkeypatch.setitem(sys.modules, module, None)  # as if not installed
    data = struct.pack(">I", 24) + b"ftyp" + brand + bytes(4) + brand + b"miaf" + bytes(100)
    (tmp_path / "a.heic").write_bytes(data)
    if brand != b"avis":  # Pillow may read AVIF, and then calls it broken
        with pytest.raises(ImageError, match=f"a.heic: .*{reason}"):
            read_image(tmp_path / "a.heic")
    monkeypatch.setattr("vpd_fast.pictures.decoding.Image.open", _only_if_registered(monkeypatch))
    with pytest.raises(ImageError, match=f"a.heic: .*{reason}"):
        read_image(tmp_path / "a.heic")
    plugin = types.SimpleNamespace(register_heif_opener=_Registered.set)
    for module in ("pillow_heif", "pillow_avif"):
        monkeypatch.setitem(sys.modules, module, plugin)
    if brand == b"avis":
        _Registered.set()  # its import registers it
        monkeypatch.setattr(_Registered, "calls", -1)
    np.testing.assert_array_equal(read_image(tmp_path / "a.heic"), RGB)


class _Registered:
    done = False
    calls = 0

    @classmethod
    def set(cls) -> None:
        cls.done = True


def _only_if_registered(monkeypatch):
    from PIL import UnidentifiedImageError

    monkeypatch.setattr(_Registered, "done", False)
    calls: list[int] = []

    def open_image(file: object, formats: object) -> Image.Image:
        calls.append(1)
        if not _Registered.done or len(calls) < 2:
            raise UnidentifiedImageError("cannot identify image file")
        return Image.fromarray(RGB)

    return open_image


@pytest.mark.filterwarnings("error")
def test_warnings_of_pillow_are_not_printed(tmp_path, capfd):
    image = Image.fromarray(RGB[..., 0]).convert("P")
    image.info["transparency"] = bytes([0, 255] * 4)
    image.save(tmp_path / "a.png")
    read_image(tmp_path / "a.png")
    monkey = warnings.catch_warnings()
    with monkey:
        warnings.simplefilter("error")
        read_image(tmp_path / "a.png")
    assert capfd.readouterr().err == ""
