"""Many images: records that survive, errors of single ones, reading ahead."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vpd_fast.errors import ImageError, InputError, ModelError
from vpd_fast.inference import predict_images as loop
from vpd_fast.inference.listing import Shard
from vpd_fast.inference.predict_images import predict_images
from vpd_fast.inference.records import Records, ResultsFile, recorded
from vpd_fast.inference.resuming import EARLIER, FULL, drop_cut_line

HEADER = {"task": "segmentation", "options": {"flip": True}}


@pytest.fixture
def pictures(tmp_path):
    """`pictures(n)` -> (name, path) of n images, whose grey is their number."""

    def make(count: int) -> list[tuple[str, str]]:
        found = []
        for i in range(count):
            path = tmp_path / f"{i}.png"
            Image.new("RGB", (8, 6), (i, i, i)).save(path)
            found.append((path.name, str(path)))
        return found

    return make


def grey(image: np.ndarray) -> int:
    return int(image[0, 0, 0])


def note(result: int, name: str) -> dict:
    return {"grey": result}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_in_order_and_failures_apart(tmp_path, pictures) -> None:
    images = pictures(5)
    Path(images[2][1]).write_bytes(b"no image")
    with Records(tmp_path, Shard(), HEADER) as records:
        found = list(predict_images(grey, images, note, records, prefetch=2))
    assert [record.get("grey") for record in found] == [0, 1, None, 3, 4]
    assert (records.done, records.failed) == (4, 1)
    header, *written = lines(tmp_path / "results.jsonl")
    assert header == {"header": HEADER}
    assert written == found
    name, reason = (tmp_path / "failed.txt").read_text().strip().split("\t")
    assert json.loads(name) == "2.png"
    assert "cannot read the image" in reason


def test_resume_does_what_is_left(tmp_path, pictures) -> None:
    images = pictures(6)
    good = Path(images[1][1]).read_bytes()
    Path(images[1][1]).write_bytes(b"broken")
    with Records(tmp_path, Shard(), HEADER) as records:
        list(predict_images(grey, images[:4], note, records))
    path = tmp_path / "results.jsonl"
    # Killed while it wrote a record: the last line has no end.
    path.write_text(path.read_text()[:-20])
    Path(images[1][1]).write_bytes(good)
    with Records(tmp_path, Shard(), HEADER, resume=True) as records:
        found = list(predict_images(grey, images, note, records))
    assert [record["image"] for record in found] == ["1.png", "3.png", "4.png", "5.png"]
    assert records.skipped == 2
    done = [record["image"] for record in lines(path)[1:] if "error" not in record]
    assert sorted(done) == [name for name, _ in images]
    assert not (tmp_path / "failed.txt").exists()  # nothing fails any more


def test_resume_with_another_number_of_shards(tmp_path, pictures) -> None:
    images = pictures(7)
    for i in range(3):
        with Records(tmp_path, Shard(i, 3), HEADER) as records:
            list(predict_images(grey, list(Shard(i, 3).take(images))[:2], note, records))
    with Records(tmp_path, Shard(), HEADER, resume=True) as records:
        assert [record["image"] for record in predict_images(grey, images, note, records)] == ["6.png"]


def test_another_run_in_the_folder(tmp_path) -> None:
    with Records(tmp_path, Shard(), HEADER):
        pass
    with pytest.raises(InputError, match=r"results.jsonl exists: --resume"):
        Records(tmp_path, Shard(), HEADER)
    with pytest.raises(InputError, match=r"task was 'segmentation', is 'depth'"):
        Records(tmp_path, Shard(), {**HEADER, "task": "depth"}, resume=True)
    assert not list(tmp_path.glob(".*"))  # no lock is left


DAMAGE = {
    "a number": b"5", "null": b"null", "a list": b'["image"]', "deep lists": b"[" * 100_000, "no name": b'{"a": 1}',
    "a name that is none": b'{"image": 3}', "no UTF-8": b'{"image": "\xff"}', "zeros": bytes(300),
    "half": b'{"image": "1.p', "not finite": b"NaN", "nothing": b"",
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_lines_are_set_aside(tmp_path, pictures, kind: str) -> None:
    images, path = pictures(4), tmp_path / "results.jsonl"
    with Records(tmp_path, Shard(), HEADER) as records:
        list(predict_images(grey, images[:3], note, records))
    header, *whole = path.read_bytes().splitlines(keepends=True)
    damaged = b"".join([header, whole[0], DAMAGE[kind] + b"\n", whole[2], DAMAGE[kind] + b"\n"])
    path.write_bytes(damaged)
    with Records(tmp_path, Shard(), HEADER, resume=True) as records:
        found = list(predict_images(grey, images, note, records))
    assert [record["image"] for record in found] == ["1.png", "3.png"]
    assert records.notes == [f"{path}: 2 damaged lines (3, 5); kept as damaged-results.jsonl"]
    assert (tmp_path / "damaged-results.jsonl").read_bytes() == damaged
    assert [line.get("image") for line in lines(path)] == [None, "0.png", "2.png", "1.png", "3.png"]
    # And again, with the first line, without which nothing in the file counts.
    path.write_bytes(DAMAGE[kind] + b"\n" + whole[0])
    with Records(tmp_path, Shard(), HEADER, resume=True) as records:
        assert len(list(predict_images(grey, images, note, records))) == 4
    assert "its first line, which says what it holds, is damaged" in records.notes[0]
    assert (tmp_path / "damaged-2-results.jsonl").read_bytes() == DAMAGE[kind] + b"\n" + whole[0]
    assert len(lines(path)) == 5


def test_damaged_lines_of_another_shard_are_left_alone(tmp_path, pictures) -> None:
    images, other = pictures(4), tmp_path / "results-00001-of-00002.jsonl"
    for i in range(2):
        with Records(tmp_path, Shard(i, 2), HEADER) as records:
            list(predict_images(grey, Shard(i, 2).take(images), note, records))
    content = other.read_bytes() + b"5\n"
    other.write_bytes(content)
    with Records(tmp_path, Shard(0, 2), HEADER, resume=True) as records:
        assert not list(predict_images(grey, images, note, records))
    assert other.read_bytes() == content
    assert "which are left alone" in records.notes[0]


def test_two_runs_in_a_folder(tmp_path) -> None:
    with Records(tmp_path, Shard(), HEADER):
        with pytest.raises(InputError, match="another run of this process writes there"):
            Records(tmp_path, Shard(), HEADER, resume=True)
        with pytest.raises(InputError, match="another run .*writes there"):  # which would do the same images
            Records(tmp_path, Shard(0, 2), HEADER, resume=True)
    with (
        Records(tmp_path, Shard(0, 2), HEADER, resume=True),
        Records(tmp_path, Shard(1, 2), HEADER, resume=True),
        pytest.raises(InputError, match="another run .*writes there"),
    ):
        Records(tmp_path, Shard(0, 3), HEADER, resume=True)
    with Records(tmp_path, Shard(), HEADER, resume=True):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "results-00000-of-00002.jsonl", "results-00001-of-00002.jsonl", "results.jsonl"
    ]  # fmt: skip


@pytest.mark.parametrize("what", ["folder", "file", "moved", "shortened", "pictures"])
def test_a_run_whose_records_vanish_fails(tmp_path, pictures, what: str) -> None:
    images, folder = pictures(6), tmp_path / "out"
    folder.mkdir()

    def write(result: int, name: str) -> dict:
        folder.mkdir(exist_ok=True)  # as whatever writes pictures does
        (folder / name).touch()
        return {"files": [name]}

    def predictor(image: np.ndarray) -> int:
        if grey(image) == 4:
            if what == "folder":
                shutil.rmtree(folder)
            elif what == "file":
                (folder / "results.jsonl").unlink()
            elif what == "moved":
                folder.rename(tmp_path / "elsewhere")
            elif what == "shortened":
                (folder / "results.jsonl").write_text("")
            else:
                (folder / "1.png").unlink()
        return grey(image)

    expected = "1 of the 6 files that this run wrote are not there any more, 1.png among them"
    message = expected if what == "pictures" else "results.jsonl: was removed"
    with pytest.raises(ImageError, match=message), Records(folder, Shard(), HEADER) as records:
        list(predict_images(predictor, images, write, records, prefetch=1))
    if what == "pictures":
        with pytest.raises(ImageError, match="1.png among them"), ResultsFile(tmp_path / "r.json", {}) as results:
            results.add({"image": "1.png", "files": ["out/1.png"]})
        assert (tmp_path / "r.json").exists()


def test_names_of_the_results_of_an_earlier_run(tmp_path) -> None:
    """Files that do not say how results are named are of a run that kept folders and endings, and drew PNGs."""
    assert recorded(tmp_path) == {}
    with Records(tmp_path, Shard(), HEADER):
        pass
    assert recorded(tmp_path) == {**HEADER, **EARLIER} == {**HEADER, "names": FULL, "overlay": "png"}
    with Records(tmp_path, Shard(), {**HEADER, "names": FULL}, resume=True):
        pass
    with pytest.raises(InputError, match=r"is of another run \(names was 'full', is 'short'\)"):
        Records(tmp_path, Shard(), {**HEADER, "names": "short"}, resume=True)
    for damage in DAMAGE.values():
        (tmp_path / "results.jsonl").write_bytes(damage + b"\n")
        assert recorded(tmp_path) == {}
    (tmp_path / "results.jsonl").write_text('{"header": 5}\n')
    assert recorded(tmp_path) == {}


def test_one_file_at_the_end(tmp_path, pictures) -> None:
    images = pictures(4)
    Path(images[2][1]).write_bytes(b"no image")
    path = tmp_path / "results.json"
    with ResultsFile(path, HEADER, footer=lambda: {"peak": 5}) as results:
        found = list(predict_images(grey, images, note, results, prefetch=0))
        assert not path.exists()
    assert json.loads(path.read_text()) == results.values == {**HEADER, "images": found, "peak": 5}
    assert (results.done, results.failed, results.skipped) == (3, 1, 0)
    with ResultsFile(path, HEADER), pytest.raises(KeyboardInterrupt):
        raise KeyboardInterrupt
    assert json.loads(path.read_text())["images"] == found  # nothing was recorded, nothing is lost


def test_the_file_has_what_was_done_before_an_interruption(tmp_path, pictures) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt), ResultsFile(path, HEADER) as results:  # noqa: PT012
        for record in predict_images(grey, pictures(4), note, results):
            if record["grey"] == 1:
                raise KeyboardInterrupt
    greys = [record["grey"] for record in json.loads(path.read_text())["images"]]
    assert greys == list(range(len(greys)))
    assert greys[:2] == [0, 1]  # and what was predicted by then


def test_the_error_of_an_only_image_is_raised(tmp_path) -> None:
    with (
        pytest.raises(ImageError, match="nowhere.png: cannot read"),
        ResultsFile(tmp_path / "a", {}, only=True) as only,
    ):
        list(predict_images(grey, [("x", "nowhere.png")], note, only))
    assert not (tmp_path / "a").exists()


def test_too_little_memory_while_writing(tmp_path, pictures) -> None:
    def write(result: int, name: str) -> dict:
        raise MemoryError

    with ResultsFile(tmp_path / "a", {}) as results:
        (record,) = predict_images(grey, pictures(1), write, results)
    assert record == {"image": "0.png", "error": "0.png: not enough memory for an image of this size"}


def test_a_file_that_cannot_be_made(tmp_path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        Records(tmp_path / "missing", Shard(), HEADER)


@pytest.mark.parametrize("size", [0, 10, 70_000, 200_000])
def test_lines_cut_anywhere(tmp_path, size: int) -> None:
    path = tmp_path / "r"
    path.write_bytes(b"first\n" + b"x" * size)
    drop_cut_line(path)
    assert path.read_bytes() == b"first\n"
    path.write_bytes(b"x" * size)
    drop_cut_line(path)
    assert path.read_bytes() == b""


def test_errors_of_single_images(tmp_path, pictures) -> None:
    def predictor(image: np.ndarray) -> int:
        if grey(image) == 0:
            raise torch.OutOfMemoryError("big")
        if grey(image) == 1:
            raise InputError("too small")
        return grey(image)

    def write(result: int, name: str) -> dict:
        if result == 2:
            raise ImageError("2.png: cannot write the file") from OSError(errno.ENAMETOOLONG, "File name too long")
        if result == 3:
            raise UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed")
        return {}

    with Records(tmp_path, Shard(), HEADER) as records:
        found = list(predict_images(predictor, pictures(5), write, records))
    assert [record.get("error") for record in found] == [
        "0.png: not enough memory for an image of this size", "1.png: too small", "2.png: cannot write the file",
        "3.png: the results cannot be written (UnicodeEncodeError: 'utf-8' codec can't encode character '\\udcff' in "
        "position 0: surrogates not allowed)", None,
    ]  # fmt: skip


@pytest.mark.parametrize("error", [ValueError("odd"), OSError(36, "File name too long"), RuntimeError(), MemoryError()])
def test_whatever_a_decoder_raises_is_the_error_of_its_image(tmp_path, pictures, monkeypatch, error: Exception) -> None:
    actual = loop.read_image

    def read(path: str) -> np.ndarray:
        if "1.png" in path:
            raise error
        return actual(path)

    monkeypatch.setattr(loop, "read_image", read)
    with Records(tmp_path, Shard(), HEADER) as records:
        found = list(predict_images(grey, pictures(3), note, records))
    assert [record.get("grey") for record in found] == [0, None, 2]
    assert "1.png: " in found[1]["error"]


def test_names_that_are_no_text(tmp_path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    images = [(name, f"nowhere/{name}"), ("\ud800", "\ud800")]
    with Records(tmp_path, Shard(), HEADER) as records:
        assert len(list(predict_images(grey, images, note, records))) == 2
    first, second = (tmp_path / "failed.txt").read_text(errors="surrogateescape").splitlines()
    assert json.loads(first.split("\t")[0]) == name
    assert json.loads(second.split("\t")[0]) == "\ud800"
    with Records(tmp_path, Shard(), HEADER, resume=True) as records:
        records.add({"image": name})
    with Records(tmp_path, Shard(), HEADER, resume=True) as records:
        assert records.is_done(name)


FULL_DISK = {
    "errno": OSError(errno.ENOSPC, "No space left on device"),
    "NumPy": OSError("16384 requested and 4096 written"),
    "torch": RuntimeError("[enforce fail at inline_container.cc:783] . PytorchStreamWriter failed writing file data/0"),
    "read-only": OSError(errno.EROFS, "Read-only file system"),
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", FULL_DISK)
def test_a_full_disk_ends_the_run(tmp_path, pictures, kind: str, wrapped: bool) -> None:
    def write(result: int, name: str) -> dict:
        if result == 3 and wrapped:
            raise ImageError(f"{name}: cannot write the file") from FULL_DISK[kind]
        if result == 3:
            raise FULL_DISK[kind]
        return {"grey": result}

    with Records(tmp_path, Shard(), HEADER) as records, pytest.raises(ImageError, match=r"3\.png: "):
        list(predict_images(grey, pictures(40), write, records, prefetch=2))
    greys = [record["grey"] for record in lines(tmp_path / "results.jsonl")[1:]]
    assert greys[:3] == [0, 1, 2]
    assert 3 not in greys  # what was written after it is recorded, too
    assert len(greys) < 10


def test_an_error_of_the_program_keeps_what_is_predicted(tmp_path, pictures) -> None:
    def predictor(image: np.ndarray) -> int:
        if grey(image) == 4:
            raise TypeError("a mistake")
        return grey(image)

    images = pictures(8)
    message = rf"{re.escape(images[4][0])}: the model failed \(TypeError: a mistake\)"
    with Records(tmp_path, Shard(), HEADER) as records, pytest.raises(ModelError, match=message) as caught:
        list(predict_images(predictor, images, note, records, prefetch=8))
    assert isinstance(caught.value.__cause__, TypeError)
    assert [record["grey"] for record in lines(tmp_path / "results.jsonl")[1:]] == [0, 1, 2, 3]


def test_an_interruption_keeps_what_is_predicted(tmp_path, pictures) -> None:
    def predictor(image: np.ndarray) -> int:
        if grey(image) == 4:
            raise KeyboardInterrupt
        return grey(image)

    with Records(tmp_path, Shard(), HEADER) as records, pytest.raises(KeyboardInterrupt):
        list(predict_images(predictor, pictures(8), note, records, prefetch=8))
    assert [record["grey"] for record in lines(tmp_path / "results.jsonl")[1:]] == [0, 1, 2, 3]


def test_reading_goes_ahead_but_not_far(tmp_path, pictures, monkeypatch) -> None:
    read: list[str] = []
    seen: list[int] = []
    lock = threading.Lock()
    actual = loop.read_image

    def counted(path: str) -> np.ndarray:
        with lock:
            read.append(path)
        return actual(path)

    monkeypatch.setattr(loop, "read_image", counted)

    def predictor(image: np.ndarray) -> int:
        deadline = time.monotonic() + 5
        while len(read) < min(20, grey(image) + 4) and time.monotonic() < deadline:
            time.sleep(0.001)  # the readers' turn
        seen.append(len(read))
        return 0

    with Records(tmp_path, Shard(), HEADER) as records:
        list(predict_images(predictor, pictures(20), note, records, prefetch=3))
    assert seen == [min(i + 4, 20) for i in range(20)]  # this one, and three more


def test_memory_does_not_grow_with_images(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(loop, "read_image", lambda path: np.zeros((1, 1, 3), np.uint8))

    def used(count: int, folder: Path) -> int:
        folder.mkdir()
        names = ((f"{i:09d}.jpg", f"/images/{i:09d}.jpg") for i in range(count))
        tracemalloc.start()
        with Records(folder, Shard(), HEADER) as records:
            for _ in predict_images(grey, names, note, records):
                pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert records.done == count
        return peak

    used(50, tmp_path / "first")  # what is allocated once
    assert used(3000, tmp_path / "many") < used(300, tmp_path / "few") + 100_000  # a record alone is 300 bytes and more
