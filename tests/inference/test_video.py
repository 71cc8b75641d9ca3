"""Videos: frames of all kinds of files, parts that are joined, and runs that go on."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

av = pytest.importorskip("av", reason='needs PyAV (pip install "vpd_fast[video]")')

from vpd_fast.cli.main import run  # noqa: E402
from vpd_fast.errors import ImageError, InputError, ModelError  # noqa: E402
from vpd_fast.inference import make_predictor, video  # noqa: E402
from vpd_fast.inference.video import frame_count, frames, predict_video  # noqa: E402

from ..helpers.clips import KINDS, make_clip, picture, times  # noqa: E402
from ..helpers.pages import example  # noqa: E402
from .stand_in import StandIn  # noqa: E402

HEADER = {"model": "stand-in"}


@pytest.fixture(scope="module")
def predictor() -> Any:
    return make_predictor(StandIn(num_classes=3).eval(), mode="whole", batch_size=2)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", sound="aac")


def decoded(path: Path) -> list[tuple[float, np.ndarray]]:
    return [(round(frame.time, 3), frame.image) for frame in frames(path)]


def sound_of(path: Path) -> tuple[str, float] | None:
    """Codec and seconds."""
    with av.open(str(path)) as file:
        if not file.streams.audio:
            return None
        packets = [p for p in file.demux(file.streams.audio[0]) if p.dts is not None]
        return file.streams.audio[0].codec_context.name, float(packets[-1].pts * packets[-1].time_base)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file(predictor: Any, tmp_path: Path, name: str) -> None:
    """All frames come at their times, and so they are in what is written, with the sound."""
    path = make_clip(tmp_path / name, **KINDS[name])
    found = list(frames(path))
    expected = times(12, "uneven" in name)
    assert [frame.number for frame in found] == list(range(12))
    start = found[0].time
    np.testing.assert_allclose([frame.time - start for frame in found], expected, atol=0.011)  # GIF has hundredths
    for i, frame in enumerate(found):
        assert np.abs(frame.image.astype(int) - picture(i)).mean() < 25
    assert frame_count(path) in (12, 13, None)
    done = predict_video(predictor, path, tmp_path / "out", HEADER, part=5)
    assert (done["done"], done["failed"], done["notes"]) == (12, 0, [])
    written = decoded(tmp_path / "out" / f"{path.stem}_overlay.mp4")
    np.testing.assert_allclose([time for time, _ in written], [frame.time for frame in found], atol=0.002)
    sound, own = sound_of(tmp_path / "out" / f"{path.stem}_overlay.mp4"), sound_of(path)
    assert (sound is None) == (own is None)
    if sound is not None and own is not None:
        assert sound[0] in video.MP4_SOUND
        assert sound[1] == pytest.approx(own[1], abs=0.15)


def test_upright(tmp_path: Path, clip: Path) -> None:
    """Frames are turned as the file says."""
    data = bytearray(clip.read_bytes())
    matrix = data.find(b"tkhd") + 44  # of the video's track
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data)
    turned = next(frames(tmp_path / "turned.mp4")).image
    assert np.abs(turned.astype(int) - np.rot90(picture(0), -1)).mean() < 25  # a quarter to the right


def test_records_and_every(predictor: Any, clip: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    done = predict_video(predictor, clip, tmp_path, HEADER, every=3, progress=lambda count, record: seen.append(count))
    assert done == {
        "video": "clip.mp4", "frames": 4, "done": 4, "failed": 0, "files": ["clip_overlay.mp4", "clip.jsonl"],
        "notes": [],
    }  # fmt: skip
    assert seen == [1, 2, 3, 4]
    lines = [json.loads(line) for line in (tmp_path / "clip.jsonl").read_text().splitlines()]
    assert lines[0]["header"]["model"] == "stand-in"
    assert [line["frame"] for line in lines[1:]] == [0, 3, 6, 9]
    assert [line["time"] for line in lines[1:]] == [0, 0.3, 0.6, 0.9]
    assert all(line["classes"] for line in lines[1:])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.jsonl", "clip_overlay.mp4"]


def test_an_interrupted_run_goes_on(
    predictor: Any, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run that went on gives is what an unbroken one gives; finished parts are not predicted again."""
    predict_video(predictor, clip, tmp_path / "whole", HEADER, part=4)
    drawn, count = video.drawn, 0

    def failing(result: Any) -> Any:
        nonlocal count
        count += 1
        if count == 10:
            raise KeyboardInterrupt
        return drawn(result)

    monkeypatch.setattr(video, "drawn", failing)
    with pytest.raises(KeyboardInterrupt):
        predict_video(predictor, clip, tmp_path / "out", HEADER, part=4)
    assert not (tmp_path / "out" / "clip_overlay.mp4").exists()
    with pytest.raises(InputError, match="clip.mp4 was begun in .*--resume goes on"):
        predict_video(predictor, clip, tmp_path / "out", HEADER, part=4)
    with pytest.raises(InputError, match=r"was begun with other options \(model\)"):
        predict_video(predictor, clip, tmp_path / "out", {"model": "other"}, part=4, resume=True)
    assert predict_video(predictor, clip, tmp_path / "out", HEADER, part=4, resume=True)["done"] == 12
    assert count == 10 + 4
    assert (tmp_path / "out" / "clip.jsonl").read_bytes() == (tmp_path / "whole" / "clip.jsonl").read_bytes()
    # x264's bytes are not always the same for the same pictures, where it has AVX-512.
    ended, whole = (decoded(tmp_path / name / "clip_overlay.mp4") for name in ("out", "whole"))
    assert [time for time, _ in ended] == [time for time, _ in whole]
    for (_, got), (_, expected) in zip(ended, whole, strict=True):
        assert np.abs(got.astype(int) - expected).mean() < 1
    assert len(list((tmp_path / "out").iterdir())) == 2
    with pytest.raises(InputError, match=r"clip.jsonl exists: choose another folder"):
        predict_video(predictor, clip, tmp_path / "out", HEADER)


def test_damage(predictor: Any, clip: Path, tmp_path: Path) -> None:
    """Frames that cannot be decoded are named and counted; the rest is done."""
    cut = make_clip(tmp_path / "cut.mkv", 40)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 2 // 3])
    done = predict_video(predictor, cut, tmp_path, HEADER)
    assert 0 < done["done"] < 40
    holes = make_clip(tmp_path / "holes.avi", codec="mjpeg", pixels="yuvj420p")
    data = bytearray(holes.read_bytes())
    start = data.find(b"\xff\xd8", len(data) // 2)
    end = data.find(b"\xff\xd8", start + 2)
    data[start : end - 8] = bytes(end - 8 - start)  # all of a frame
    holes.write_bytes(data)
    done = predict_video(predictor, holes, tmp_path, HEADER)
    assert (done["done"], done["failed"]) == (11, 1)
    lines = [json.loads(line) for line in (tmp_path / "holes.jsonl").read_text().splitlines()[1:]]
    (failed,) = [line for line in lines if "error" in line]
    assert "is damaged" in failed["error"]
    assert len(decoded(tmp_path / "holes_overlay.mp4")) == 11


def test_what_is_no_video(predictor: Any, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ImageError, match=r"text.mp4: cannot be read as a video"):
        predict_video(predictor, tmp_path / "text.mp4", tmp_path / "out", HEADER)
    with av.open(str(tmp_path / "sound.mp4"), "w") as file:
        voice = file.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
        frame.rate = 16_000
        file.mux(voice.encode(frame))
        file.mux(voice.encode(None))
    with pytest.raises(ImageError, match=r"sound.mp4: has no video stream"):
        frame_count(tmp_path / "sound.mp4")
    make_clip(tmp_path / "cut.mp4")
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "cut.mp4").read_bytes()[:600])
    with pytest.raises(ImageError, match=r"cut.mp4: cannot be read as a video"):
        predict_video(predictor, tmp_path / "cut.mp4", tmp_path / "out", HEADER)


def test_a_model_that_fails_ends_the_run(clip: Path, tmp_path: Path) -> None:
    predictor = make_predictor(StandIn(num_classes=3).eval(), mode="whole")
    predictor.model.forward = lambda *_: 1 / 0
    predictor.model.extract_feat = predictor.model.encode = predictor.model.forward
    with pytest.raises(ModelError, match=r"frame 0.*: the model failed \(ZeroDivisionError"):
        predict_video(predictor, clip, tmp_path, HEADER)


def test_the_example_of_the_page(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip.mp4").write_bytes(clip.read_bytes())
    found: dict[str, Any] = {"model": StandIn(num_classes=3).eval()}
    exec(example("video.md", "predict_video"), found)
    assert found["done"]["frames"] == 12


def test_command_line(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--checkpoint", "shapes-segmentation", "--mode", "whole", "-o", str(tmp_path / "out")]
    assert run(["predict", str(clip), "--every", "6", *model]) == 0
    assert "clip.mp4: 2 frames: " in capsys.readouterr().out
    broken = tmp_path / "broken.mp4"
    broken.write_text("no video")
    good = make_clip(tmp_path / "good.mp4", 2)
    assert run(["predict", str(broken), str(good), *model]) == 1
    assert "failed: " in capsys.readouterr().err
    assert (tmp_path / "out" / "good_overlay.mp4").is_file()
    for arguments, message in (
        ([str(clip), "photo.png"], "videos and images are runs of their own"),
        ([str(clip), "--overlay", "png"], "videos take neither --overlay"),
        ([str(clip), "--every", "0"], "--every is for videos, at least 1"),
        (["photo.png", "--every", "2"], "--every is for videos"),
        ([str(tmp_path / "none.mp4")], "none.mp4 does not exist"),
        ([str(clip), str(tmp_path / "clip.mov")], "two videos are called clip"),
        (["0"], "--show is for a camera"),
        ([str(clip), "--show"], "--show is for a camera"),
    ):
        assert run(["predict", *arguments, *model]) != 0
        assert message in capsys.readouterr().err


class Camera:
    """Two pictures, then none."""

    def __init__(self, number: int) -> None:
        self.left = 2

    def isOpened(self) -> bool:  # noqa: N802
        return True

    def read(self) -> tuple[bool, np.ndarray | None]:
        self.left -= 1
        return self.left >= 0, np.zeros((64, 96, 3), np.uint8)

    def release(self) -> None:
        self.left = -1


@pytest.mark.parametrize("windows", [True, False])
def test_a_camera(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], windows: bool) -> None:
    import cv2

    shown: list[np.ndarray] = []

    def show(title: str, pixels: np.ndarray) -> None:
        if not windows:
            raise cv2.error("The function is not implemented")
        shown.append(pixels)

    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    monkeypatch.setattr(cv2, "imshow", show)
    monkeypatch.setattr(cv2, "waitKey", lambda _: ord("q") if len(shown) == 2 else -1)
    monkeypatch.setattr(cv2, "destroyAllWindows", lambda: None)
    code = run(["predict", "0", "--show", "--checkpoint", "shapes-segmentation", "--mode", "whole"])
    told = capsys.readouterr()
    if windows:
        assert code == 0
        assert "2 pictures, " in told.out
        assert shown[0].shape == (320, 480, 3)
    else:
        assert code != 0
        assert "pip install opencv-python" in told.err
