"""Small text files whatever wrote them, and writing through temporary names."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vpd_fast import files
from vpd_fast.errors import MAX_SHOWN, ImageError, brief

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_text_of_every_editor(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes("Brücke\r\nBaum\n".encode(encoding))
    assert files.read_text(path) == "Brücke\nBaum\n"
    path.write_bytes('{"a": [1]}'.encode(encoding))
    assert files.read_json(path) == {"a": [1]}


def test_names_that_are_not_utf8_survive(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbfcaf\xe9.png\n")
    assert os.fsencode(files.read_text(path, names=True)) == b"caf\xe9.png\n"
    files.write_text(path, "caf\udce9.png\n")
    assert path.read_bytes() == b"caf\xe9.png\n"
    files.write_text(path, "\ud800")  # half a character that stands for no byte
    assert path.read_bytes() == b"\\ud800"
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(UnicodeDecodeError):
        files.read_text(path)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_lines_of_a_stream_that_stays_open(encoding: str) -> None:
    stream = io.BufferedReader(io.BytesIO("é.png\nb.png\n".encode(encoding)))
    assert list(files.lines_of_names(stream)) == ["é.png\n", "b.png\n"]
    assert not stream.closed


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for read in (files.read_text, files.read_json):
        with pytest.raises(OSError, match="a pipe"):
            read(tmp_path / "pipe")


@pytest.mark.parametrize("text", ["[" * 100_000, "[" * 40 + "]" * 40, '{"a": NaN}', "[-Infinity]", "[1", '"\ud800'])
def test_json_that_is_no_setting(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        files.parse_json(text)


def test_settings_that_share_their_parts() -> None:
    shared: list = [1] * 1000
    for _ in range(12):  # 10**39 values in a few kilobytes, as anchors of YAML can make them
        shared = [shared] * 1000
    with pytest.raises(ValueError, match="more than"):
        files.check_size(shared)


def test_large_settings_are_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(files.MAX_SETTINGS + 1)
    with pytest.raises(ValueError, match="settings have at most"):
        files.read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"a JSON object, got \[1\]"):
        files.read_json_object(tmp_path / "a.json")


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("old")

    def stop(temporary: Path) -> None:
        assert first.read_text() == "old"
        temporary.write_text("half of it")
        raise OSError("the disk is full")

    with pytest.raises(ImageError, match="first: cannot be written .the disk is full"):
        files.write_files({first: lambda temporary: temporary.write_text("new"), second: stop}, ImageError)
    assert first.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_names_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 251 + ".txt")
    files.write_files({path: lambda temporary: files.write_text(temporary, "a")})
    assert path.read_text() == "a"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    longer = tmp_path / ("x" * 256)
    with pytest.raises(ImageError, match="cannot be written"):
        files.write_files({longer: lambda temporary: files.write_text(temporary, "a")}, ImageError)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_values_in_messages_are_short() -> None:
    shared: tuple = (None,) * 10
    for _ in range(9):
        shared = (shared,) * 10  # printed whole, it has 10**10 items
    for value in (shared, "x" * 10**6, 10**5000, {i: [i] * 10**5 for i in range(99)}, object()):
        assert len(brief(value)) <= MAX_SHOWN
    assert brief({"a": [1, "b"]}) == "{'a': [1, 'b']}"
    assert json.loads(files.json_text({"a": "caf\udce9"})) == {"a": "caf\udce9"}


def test_what_killed_processes_left_half_written_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    monkeypatch.setattr(os, "getpid", lambda: ended.pid)
    left = files.temporary_path(tmp_path / "a.png")
    monkeypatch.undo()
    mine, others = files.temporary_path(tmp_path / "a.png"), [tmp_path / name for name in (".notes.tmp", ".1-2.tmp")]
    monkeypatch.setattr(files, "_machine", lambda: "0123abcd")
    foreign = files.temporary_path(tmp_path / "a.png")
    old = files.temporary_path(tmp_path / "b.png")
    monkeypatch.undo()
    for path in (left, mine, foreign, old, *others):
        path.touch()
    os.utime(old, (1, 1))
    files.write_files({tmp_path / "a.png": lambda path: path.write_bytes(b"x")})
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "a.png", mine, foreign, *others])
    left.touch()
    files.write_files({tmp_path / "a.png": lambda path: path.write_bytes(b"x")})
    assert left.exists()  # a folder is looked through once
    assert len(left.name) < 48
