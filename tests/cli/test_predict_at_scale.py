"""`vpd-fast predict` on many images: shards, resuming, lists, and what it says when something is wrong."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vpd_fast import VPDConfig
from vpd_fast.cli.main import run

from ..helpers import processes
from ..helpers.backbones import TINY

NAMES = ["a.jpg", "a.png", "sub/a.jpg", "sub/deep er/b ü.jpg", "z.jpg"]


@pytest.fixture
def model(tmp_path) -> list[str]:
    """Options that build a small random model."""
    VPDConfig(num_classes=5, channels=32, base_size=64, backbone=TINY).save(tmp_path / "config.json")
    return ["--random-weights", "1", "--config", str(tmp_path / "config.json"), "--mode", "whole"]


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder with subfolders; a.jpg and a.png are different pictures."""
    for i, name in enumerate(NAMES):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((64, 64 + 8 * i)).save(path)
    return tmp_path / "images"


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.[jp][pn]g")}


def records(path: Path) -> dict[str, dict]:
    return {r["image"]: r for r in map(json.loads, path.read_text().splitlines()[1:])}


def test_shards_make_what_one_process_makes(model, images, tmp_path, capsys) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(["predict", str(images), *model, "-r", "-o", str(one)]) == 0
    out = capsys.readouterr().out
    assert "note: the weights are random" in out
    assert "5 images, " in out
    for i in range(2):
        assert run(["predict", str(images), *model, "-r", "-o", str(two), "--shard", f"{i}/2", "--prefetch", "1"]) == 0
    assert files(one) == files(two)
    assert files(one).keys() == {f"{name}{end}" for name in NAMES for end in (".png", "_overlay.jpg")}
    whole = records(one / "results.jsonl")
    parts = [records(two / f"results-0000{i}-of-00002.jsonl") for i in range(2)]
    assert [len(part) for part in parts] == [3, 2]
    joined = parts[0] | parts[1]
    assert joined.keys() == whole.keys() == set(NAMES)
    for name, record in whole.items():
        assert record["files"] == [f"{name}.png", f"{name}_overlay.jpg"]
        assert {**record, "seconds": 0} == {**joined[name], "seconds": 0}


def test_environment_of_torchrun(model, images, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert run(["predict", str(images), *model, "-o", str(tmp_path / "out")]) == 0
    found = records(tmp_path / "out" / "results-00001-of-00003.jsonl")
    assert list(found) == ["a.png"]  # not -r: three images, one of them this process's


def test_lists(model, images, tmp_path, monkeypatch, capsys) -> None:
    lines = f"# mine\n{images}/sub/a.jpg\n\nz.jpg\n"
    (tmp_path / "list.txt").write_text(lines)
    options = ["--root", str(images), *model, "--json"]
    assert run(["predict", "--list", str(tmp_path / "list.txt"), *options, "-o", str(tmp_path / "a")]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["done"], summary["failed"], summary["skipped"]) == (2, 0, 0)
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert run(["predict", "--list", "-", *options, "-o", str(tmp_path / "b")]) == 0
    assert list(records(tmp_path / "a" / "results.jsonl")) == ["sub/a.jpg", "z.jpg"]
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_broken_images_and_resuming(model, images, tmp_path, capsys) -> None:
    good = (images / "a.png").read_bytes()
    (images / "a.png").write_bytes(b"broken")
    command = ["predict", str(images), *model, "-r", "-o", str(tmp_path / "out")]
    assert run(command) == 1
    printed = capsys.readouterr()
    assert "4 images" in printed.out
    assert "(1 failed)" in printed.out
    assert "failed.txt" in printed.err
    assert (tmp_path / "out" / "failed.txt").read_text().startswith('"a.png"\t')
    assert run(command) == 2
    assert "exists: --resume goes on from it" in capsys.readouterr().err
    assert run([*command, "--resume", "--flip"]) == 2
    assert "options was {'mode': 'whole'}, is {'mode': 'whole', 'flip': True}" in capsys.readouterr().err
    (images / "a.png").write_bytes(good)
    before = files(tmp_path / "out")
    assert run([*command, "--resume"]) == 0
    assert "1 image (4 done before), " in capsys.readouterr().out
    assert {name: content for name, content in files(tmp_path / "out").items() if name in before} == before
    assert not (tmp_path / "out" / "failed.txt").exists()


def test_names_that_are_not_utf8(model, images, tmp_path, capfd, monkeypatch) -> None:
    """Such names go through lists, records, logs and --resume, and back to the bytes that the files are called."""
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))  # strict, as in a terminal
    (images / "z.jpg").rename(images / "caf\udce9.jpg")
    (images / "bad\udcff.jpg").write_bytes(b"broken")
    (tmp_path / "list.txt").write_bytes(b"caf\xe9.jpg\r\nbad\xff.jpg\r\n")
    out = tmp_path / "out\udce9"
    command = ["predict", "--list", str(tmp_path / "list.txt"), "--root", str(images), *model, "-o", str(out)]
    assert run(command) == 1
    assert os.path.exists(os.fsencode(out) + b"/caf\xe9.png")
    assert records(out / "results.jsonl")["bad\udcff.jpg"]["error"]
    name, _, reason = (out / "failed.txt").read_text("utf-8").partition("\t")
    assert (json.loads(name), "bad\\udcff.jpg: cannot read the image" in reason) == ("bad\udcff.jpg", True)
    (images / "bad\udcff.jpg").write_bytes((images / "a.jpg").read_bytes())
    assert run([*command, "--resume"]) == 0
    assert records(out / "results.jsonl").keys() == {"caf\udce9.jpg", "bad\udcff.jpg"}
    listed = str(images / "caf\udce9.jpg")
    assert run(["predict", listed, *model, "-o", str(tmp_path / "single\udce9")]) == 0
    assert json.loads((tmp_path / "single\udce9" / "results.json").read_text())["images"][0]["image"] == listed


def test_names_as_long_as_results_allow(model, images, tmp_path) -> None:
    name = "x" * (255 - len("_overlay.jpg"))
    (images / "z.jpg").rename(images / f"{name}.jpg")
    assert run(["predict", str(images / f"{name}.jpg"), *model, "-o", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / f"{name}_overlay.jpg").is_file()


def test_names_are_the_same_with_and_without_options_of_scale(model, images, tmp_path) -> None:
    (images / "a.png").unlink()
    for name, options in (("few", []), ("many", ["--prefetch", "2"])):
        assert run(["predict", str(images), *model, "-o", str(tmp_path / name), *options]) == 0
    assert files(tmp_path / "few") == files(tmp_path / "many")
    assert files(tmp_path / "few").keys() == {"a.png", "a_overlay.jpg", "z.png", "z_overlay.jpg"}
    for name, options in (("tree", [str(images / "*"), str(images / "sub" / "*")]), ("folder", [str(images), "-r"])):
        assert run(["predict", *options, *model, "-o", str(tmp_path / name)]) == 0
    assert {f"{name}.png" for name in ("a.jpg", "sub/a.jpg", "z.jpg")} < files(tmp_path / "tree").keys()
    assert files(tmp_path / "tree").items() <= files(tmp_path / "folder").items()


def test_a_run_of_an_earlier_version_goes_on_under_its_names(model, images, tmp_path) -> None:
    """Its header does not say how results are named: they had folders and endings, also where all are in one folder,
    and overlays were PNGs."""
    (images / "a.png").unlink()
    command = ["predict", str(images), *model, "--prefetch", "1", "-o", str(tmp_path / "out")]
    assert run([*command, "--overlay", "png"]) == 0
    path = tmp_path / "out" / "results.jsonl"
    header, first, _ = map(json.loads, path.read_text().splitlines())
    assert (header["header"].pop("names"), header["header"].pop("overlay")) == ("short", "png")
    path.write_text(f"{json.dumps(header)}\n{json.dumps(first)}\n")
    assert run([*command, "--resume"]) == 0
    assert records(path)["z.jpg"]["files"] == ["z.jpg.png", "z.jpg_overlay.png"]


def test_kinds_of_overlays(model, images, tmp_path, capsys) -> None:
    command = ["predict", str(images / "z.jpg"), *model, "-o"]
    for kind, ending in ((None, "jpg"), ("png", "png"), ("none", None)):
        out = tmp_path / str(kind)
        assert run([*command, str(out), "--resume", *(["--overlay", kind] if kind else [])]) == 0
        assert set(files(out)) == {"z.png", *([f"z_overlay.{ending}"] if ending else [])}
        assert records(out / "results.jsonl")["z.jpg"]["files"] == sorted(files(out))
        assert run([*command, str(out), "--resume"]) == 0  # goes on with the kind that it began with
    assert run([*command, str(tmp_path / "none"), "--resume", "--overlay", "png"]) == 2
    assert "(overlay was 'none', is 'png')" in capsys.readouterr().err
    exact, lossy = (
        np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("png/z_overlay.png", "None/z_overlay.jpg")
    )
    assert exact.shape == lossy.shape
    assert np.abs(exact - lossy).mean() < 4


def test_new_images_of_equal_names_do_not_mix_with_an_earlier_run(model, images, tmp_path, capsys) -> None:
    picture = (images / "a.png").read_bytes()
    (images / "a.png").unlink()
    command = ["predict", str(images), *model, "--resume", "-o", str(tmp_path / "out")]
    assert run(command) == 0
    (images / "a.png").write_bytes(picture)
    assert run(command) == 2
    assert "(names was 'short', is 'full'); resume with the same options, or choose" in capsys.readouterr().err


def test_killed_in_the_middle(model, images, tmp_path) -> None:
    """kill -9 loses what was being computed, no more; the folder ends up as if nothing had happened."""
    for i in range(11):
        (images / f"copy{i:02d}.jpg").write_bytes((images / "a.jpg").read_bytes())
    command = ["predict", str(images), *model, "-r"]
    process = processes.start(run, [*command, "-o", str(tmp_path / "killed")], log=tmp_path / "log")
    path = tmp_path / "killed" / "results.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not path.exists() or path.read_text().count("\n") < 5):
        time.sleep(0.01)
    process.kill()
    process.join()
    done = [line for line in path.read_text().splitlines(keepends=True)[1:] if line.endswith("\n")]
    assert 4 <= len(done) < 16
    for line in done:  # what is recorded is there
        assert all((tmp_path / "killed" / name).stat().st_size for name in json.loads(line)["files"])
    assert run(["predict", str(images), *model, "-r", "-o", str(tmp_path / "killed"), "--resume"]) == 0
    assert run(["predict", str(images), *model, "-r", "-o", str(tmp_path / "whole")]) == 0
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert records(path).keys() == records(tmp_path / "whole" / "results.jsonl").keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give images, folders or globs, or --list FILE"),
        (["nowhere", "-r"], "nowhere does not exist"),
        (["EMPTY", "-r"], "no images (.jpg"),
        (["IMAGES", "--shard", "2/2"], "shard 2/2: expected I/N with 0 <= I < N"),
        (["IMAGES", "--shard", "x"], "a shard is I/N, part I (from 0) of N, got 'x'"),
        (["IMAGES", "--prefetch", "0"], "--prefetch must be at least 1, got 0"),
        (["IMAGES", "--overlay", "gif"], "--overlay must be one of jpg, png, none, got 'gif'"),
        (["IMAGES", "-r", "-o", "IMAGES/out"], "where images are looked for; choose another folder"),
        (["images/z.jpg", "--resume", "-o", "IMAGES"], "has the images, which results could overwrite"),
        (["IMAGES", "-r", "--root", "EMPTY"], "results keep the folders below it, so choose another root"),
        (["IMAGES", "-r", "--root", "nowhere"], "nowhere: not a folder"),
        (["--list", "nowhere.txt"], "--list nowhere.txt: cannot be read"),
    ],
)
def test_bad_input(arguments, message, model, images, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    places = {"IMAGES": "images", "EMPTY": "empty", "IMAGES/out": "images/out"}
    arguments = [places.get(argument, argument) for argument in arguments]
    output = [] if "-o" in arguments else ["-o", "out"]
    assert run(["predict", *arguments, *model, *output]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
