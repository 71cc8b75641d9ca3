"""Tar shards: images in, tar or Parquet shards out, resumed shard by shard."""

from __future__ import annotations

import http.server
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

fsspec = pytest.importorskip("fsspec", reason='needs fsspec (pip install "vpd_fast[scale]")')
pytest.importorskip("webdataset", reason='needs webdataset (pip install "vpd_fast[scale]")')

from vpd_fast.cli.main import run  # noqa: E402
from vpd_fast.errors import InputError  # noqa: E402
from vpd_fast.inference import make_predictor, predict, tar_shards  # noqa: E402
from vpd_fast.inference.tar_shards import list_shards, samples  # noqa: E402

from .stand_in import StandIn  # noqa: E402

MODEL = ["--checkpoint", "shapes-segmentation", "--mode", "whole"]


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(data := io.BytesIO(), "PNG")
    return data.getvalue()


def tar(members: dict[str, bytes] | list[tuple[str, bytes]]) -> bytes:
    with tarfile.open(fileobj=(data := io.BytesIO()), mode="w") as file:
        for name, content in members.items() if isinstance(members, dict) else members:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            file.addfile(about, io.BytesIO(content))
    return data.getvalue()


def content(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as file:
        return {member.name: file.extractfile(member).read() for member in file.getmembers()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of three images."""
    (tmp_path / "in").mkdir()
    for i in range(2):
        members = {f"{i}{j}.{end}": data for j in range(3) for end, data in (("png", jpeg(3 * i + j)), ("json", b"{}"))}
        (tmp_path / "in" / f"{i:03}.tar").write_bytes(tar(members))
    return tmp_path


def test_there_and_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each image's result is what `predict` gives; finished shards are left out of a resumed run."""
    out = folder / "out"
    arguments = ["predict", str(folder / "in" / "{000..001}.tar"), *MODEL, "-o", str(out), "--overlay", "jpg"]
    assert run(arguments) == 0
    assert "6 images of 2 shards" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["000.tar", "001.tar", "results.jsonl"]
    found = content(out / "001.tar")
    assert sorted(found) == [f"1{j}.{end}" for j in range(3) for end in ("json", "overlay.jpg", "png")]
    from vpd_fast import VPD

    expected = predict(VPD.from_pretrained("shapes-segmentation"), Image.open(io.BytesIO(jpeg(4))), mode="whole")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(found["11.png"]))), expected.labels)
    assert json.loads(found["11.json"]) == expected.record()
    before = (out / "000.tar").stat().st_mtime_ns
    (out / "001.tar").unlink()
    lines = (out / "results.jsonl").read_text().splitlines()
    assert [json.loads(line).get("images") for line in lines] == [None, 3, 3]
    (out / "results.jsonl").write_text("\n".join(lines[:2]) + "\n")
    assert run([*arguments, "--resume"]) == 0
    assert "3 images of 1 shards, 1 shards done before" in capsys.readouterr().out
    assert content(out / "001.tar") == found
    assert (out / "000.tar").stat().st_mtime_ns == before


def test_parquet_and_parts_of_a_run(folder: Path) -> None:
    import pyarrow.parquet

    for i in range(2):
        command = ["predict", str(folder / "in" / "*.tar"), *MODEL, "-o", str(folder / "out")]
        assert run([*command, "--output-format", "parquet", "--shard", f"{i}/2"]) == 0
    for i in range(2):
        rows = pyarrow.parquet.read_table(folder / "out" / f"{i:03}.parquet").to_pylist()
        assert [row["key"] for row in rows] == [f"{i}{j}" for j in range(3)]
        assert all(json.loads(row["json"])["classes"] for row in rows)
        assert [[name for name, _ in row["files"]] for row in rows] == [["png"]] * 3


def test_damage(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is whole is done; what is not is named, counted, and taken again when a run is resumed."""
    whole = (folder / "in" / "001.tar").read_bytes()
    (folder / "in" / "001.tar").write_bytes(whole[: whole.index(b"11.png") + 700])
    odd = [("a.png", jpeg(0)), ("b.png", b"no image"), ("c.txt", b"x"), ("a.png", jpeg(1)), ("d.png", jpeg(2))]
    (folder / "in" / "002.tar").write_bytes(tar(odd))
    (folder / "in" / "003.tar").write_text("no shard at all, though it is long enough to be one" * 20)
    arguments = ["predict", str(folder / "in" / "*.tar"), *MODEL, "-o", str(folder / "out")]
    assert run(arguments) == 1
    told = capsys.readouterr()
    assert "001.tar is cut off or damaged" in told.err
    assert "003.tar is cut off or damaged" in told.err
    assert [key for key in content(folder / "out" / "001.tar") if key.endswith(".png")] == ["10.png"]
    found = {key: json.loads(data) for key, data in content(folder / "out" / "002.tar").items() if key.endswith("json")}
    assert "cannot" in found["b.json"]["error"]
    assert "has no image" in found["c.json"]["error"]
    assert "classes" in found["d.json"]
    (folder / "in" / "001.tar").write_bytes(whole)
    assert run([*arguments, "--resume"]) == 1  # 003.tar still is none
    assert len([key for key in content(folder / "out" / "001.tar") if key.endswith(".png")]) == 3
    assert "2 shards done before" in capsys.readouterr().out


def test_a_key_that_comes_again(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar([("a.png", jpeg(0)), ("b.png", jpeg(1)), ("a.png", jpeg(2))]))
    found = list(samples(str(tmp_path / "x.tar"), []))
    assert [isinstance(sample.data, bytes) for sample in found] == [True, True, False]
    assert "twice; the first one counts" in str(found[2].data)
    (tmp_path / "y.tar").write_bytes(tar([("a.png", jpeg(0)), ("a.png", jpeg(2))]))
    damage: list[str] = []
    (sample,) = samples(str(tmp_path / "y.tar"), damage)
    assert sample.data == jpeg(0)
    assert "duplicate" in damage[0]


class Handler(http.server.BaseHTTPRequestHandler):
    """Gives a shard, after as many errors as are left."""

    data = b""
    errors: list[int] = []  # noqa: RUF012

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:  # noqa: N802
        self.do_GET()

    def do_GET(self) -> None:  # noqa: N802
        code = 404 if "none" in self.path else self.errors.pop() if self.errors else 200
        self.send_response(code)
        self.send_header("Content-Length", str(len(self.data) if code == 200 else 0))
        self.end_headers()
        if code == 200 and self.command == "GET":
            self.wfile.write(self.data)


@pytest.fixture
def address() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_addresses(
    folder: Path, address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shard that comes at the third try is done; one that is not there is an error at once."""
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(tar_shards, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(Handler, "data", (folder / "in" / "000.tar").read_bytes())
    monkeypatch.setattr(Handler, "errors", [503, 503])
    with fsspec.open("memory://bucket/m.tar", "wb") as file:
        file.write((folder / "in" / "001.tar").read_bytes())
    names = [f"{address}/a.tar", f"{address}/none.tar", "memory://bucket/*.tar"]
    assert run(["predict", *names, *MODEL, "-o", str(folder / "out")]) == 1
    told = capsys.readouterr()
    assert "none.tar: cannot be read (FileNotFoundError" in told.err
    assert "6 images of 3 shards" in told.out
    assert sorted(path.name for path in (folder / "out").glob("*.tar")) == ["a.tar", "m.tar"]


def test_results_are_uploaded(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Complete shards of results are moved; where that fails the run ends, and a resumed one uploads them."""
    monkeypatch.setattr(tar_shards, "FIRST_WAIT", 0.01)
    memory = fsspec.filesystem("memory")
    put, failures = type(memory).put_file, [OSError("slow down")] * 4

    def put_later(*arguments: Any, **options: Any) -> None:
        if failures:
            raise failures.pop()
        put(*arguments, **options)

    monkeypatch.setattr(type(memory), "put_file", put_later)
    arguments = ["predict", str(folder / "in" / "*.tar"), *MODEL, "-o", str(folder / "out")]
    arguments += ["--upload", "memory://results/run"]
    assert run(arguments) == 2
    assert "memory://results/run/000.tar: cannot be written (OSError: slow down); " in capsys.readouterr().err
    kept = content(folder / "out" / "000.tar")
    assert run([*arguments, "--resume"]) == 0
    assert "6 images of 2 shards: memory://results/run" in capsys.readouterr().out
    assert [path.name for path in (folder / "out").iterdir()] == ["results.jsonl"]
    memory.get_file("/results/run/000.tar", str(folder / "got.tar"))
    assert content(folder / "got.tar") == kept
    rows = [json.loads(line) for line in (folder / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["uploaded"] for row in rows[1:]] == [f"memory://results/run/00{i}.tar" for i in range(2)]
    assert run([*arguments, "--resume"]) == 0
    assert "2 shards done before" in capsys.readouterr().out


def test_names(tmp_path: Path) -> None:
    assert list_shards(["s3://b/{00..02}.tar"]) == ["s3://b/00.tar", "s3://b/01.tar", "s3://b/02.tar"]
    with pytest.raises(InputError, match=r"nothing\*.tar matches no shard"):
        list_shards([str(tmp_path / "nothing*.tar")])
    with pytest.raises(InputError, match="two shards are called 00"):
        list_shards(["a/00.tar", "b/00.tar"])


def test_a_full_disk_ends_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tar_shards, "_files", full)
    assert run(["predict", str(folder / "in" / "*.tar"), *MODEL, "-o", str(folder / "out")]) != 0
    assert "No space left" in capsys.readouterr().err
    assert not list((folder / "out").glob("*.tar"))


def test_wrong_options(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = str(folder / "in" / "000.tar")
    for arguments, message in (
        ([shard, "photo.png"], "tar shards and images are runs of their own"),
        ([shard, "--output-format", "zip"], "--output-format is for tar shards, tar or parquet"),
        (["photo.png", "--output-format", "tar"], "--output-format is for tar shards"),
        ([shard, "--probabilities"], "tar shards take neither --probabilities"),
        ([shard, "--upload", "nothing://bucket"], "results cannot be uploaded to nothing://bucket"),
        (["photo.png", "--upload", "memory://bucket"], "--upload is for the results of tar shards"),
    ):
        assert run(["predict", *arguments, *MODEL]) != 0
        assert message in capsys.readouterr().err


def test_other_predictors(folder: Path) -> None:
    """`predict_shards` from Python, with a sink that keeps records in one file."""
    from vpd_fast.inference.records import ResultsFile

    predictor = make_predictor(StandIn(num_classes=3).eval(), mode="whole", batch_size=2)
    (folder / "out").mkdir()
    with ResultsFile(folder / "out" / "results.json", {}) as sink:
        names = list_shards([str(folder / "in" / "*.tar")])
        records = list(tar_shards.predict_shards(predictor, names, folder / "out", sink))
    assert [record["images"] for record in records] == [3, 3]
    with pytest.raises(InputError, match="shards are written as tar or parquet, got 'zip'"):
        next(tar_shards.predict_shards(predictor, names, folder, sink, to="zip"))
