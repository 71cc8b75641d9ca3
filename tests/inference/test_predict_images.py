"""Many images: parts, names, records that survive, reading ahead."""

from __future__ import annotations

import errno
import json
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vpd_fast.errors import ImageError, InputError
from vpd_fast.inference import predict_images as loop
from vpd_fast.inference.listing import Shard, read_list, relative_name, walk_images
from vpd_fast.inference.predict_images import predict_images
from vpd_fast.inference.records import FULL, Records, ResultsFile, _drop_cut_line, recorded_names

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


def test_shards_take_each_item_once() -> None:
    parts = [list(Shard(i, 3).take(range(11))) for i in range(3)]
    assert parts == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8]]
    assert Shard.parse("2/8") == Shard(2, 8)
    assert Shard.from_environment({"RANK": "3", "WORLD_SIZE": "4"}) == Shard(3, 4)
    assert Shard.from_environment({}) == Shard(0, 1)
    assert Shard(2, 8).file("results", ".jsonl") == "results-00002-of-00008.jsonl"
    assert Shard().file("results", ".jsonl") == "results.jsonl"


@pytest.mark.parametrize("text", ["", "3", "a/b", "1/2/3", "2/2", "-1/2", "0/0"])
def test_bad_shards(text: str) -> None:
    with pytest.raises(InputError, match="shard"):
        Shard.parse(text)


def test_walk_in_one_order(tmp_path) -> None:
    for name in (
        "b.jpg",
        "a.JPG",
        "c/z.png",
        "c/d/a.png",
        ".hidden.jpg",
        ".git/x.jpg",
        "notes.txt",
        "a folder/x y.jpg",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "c" / "loop").symlink_to(tmp_path)
    found = [relative_name(path, str(tmp_path)) for path in walk_images(str(tmp_path), (".jpg", ".png"))]
    assert found == ["a.JPG", "b.jpg", "a folder/x y.jpg", "c/z.png", "c/d/a.png"]
    assert len(list(walk_images(str(tmp_path), (".jpg", ".png"), recursive=False))) == 2
    with pytest.raises(InputError, match="nowhere: the folder cannot be read"):
        list(walk_images(str(tmp_path / "nowhere"), (".jpg",)))


def test_lists_and_names() -> None:
    assert list(read_list(["# a comment\n", "\n", "a b.jpg\n", "  c.jpg"])) == ["a b.jpg", "c.jpg"]
    assert relative_name("x/../y/a.jpg", "/data") == "y/a.jpg"
    assert relative_name("/data/..a/b.jpg", "/data") == "..a/b.jpg"
    with pytest.raises(InputError, match="is not in /data"):
        relative_name("/other/a.jpg", "/data")
    with pytest.raises(InputError, match="is not in /data"):
        relative_name("../a.jpg", "/data")


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
    (tmp_path / "results.jsonl").write_text("[1]\n")
    with pytest.raises(InputError, match="results.jsonl, line 1: not a record"):
        Records(tmp_path, Shard(), HEADER, resume=True)
    (tmp_path / "results.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(InputError, match="first line does not say"):
        Records(tmp_path, Shard(), HEADER, resume=True)


def test_names_of_the_results_of_an_earlier_run(tmp_path) -> None:
    """Files that do not say how results are named are of a run that kept folders and endings."""
    assert recorded_names(tmp_path) is None
    with Records(tmp_path, Shard(), HEADER):
        pass
    assert recorded_names(tmp_path) == FULL
    with Records(tmp_path, Shard(), {**HEADER, "names": FULL}, resume=True):
        pass
    with pytest.raises(InputError, match=r"is of another run \(names was 'full', is 'short'\)"):
        Records(tmp_path, Shard(), {**HEADER, "names": "short"}, resume=True)
    (tmp_path / "results.jsonl").write_text("[1]\n")
    assert recorded_names(tmp_path) is None


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
    assert [record["grey"] for record in json.loads(path.read_text())["images"]] == [0, 1]


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
    _drop_cut_line(path)
    assert path.read_bytes() == b"first\n"
    path.write_bytes(b"x" * size)
    _drop_cut_line(path)
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
        return {}

    with Records(tmp_path, Shard(), HEADER) as records:
        found = list(predict_images(predictor, pictures(4), write, records))
    assert [record.get("error") for record in found] == [
        "0.png: not enough memory for an image of this size", "1.png: too small", "2.png: cannot write the file", None
    ]  # fmt: skip


def test_a_full_disk_ends_the_run(tmp_path, pictures) -> None:
    def write(result: int, name: str) -> dict:
        if result == 3:
            raise ImageError(f"{name}: cannot write the file (No space left)") from OSError(
                errno.ENOSPC, "No space left"
            )
        return {"grey": result}

    with Records(tmp_path, Shard(), HEADER) as records, pytest.raises(ImageError, match="No space left"):
        list(predict_images(grey, pictures(40), write, records, prefetch=2))
    assert [record["grey"] for record in lines(tmp_path / "results.jsonl")[1:]] == [0, 1, 2]


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
