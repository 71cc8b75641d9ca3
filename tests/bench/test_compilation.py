"""Compiling kernels ahead of time: what passes launch, keys beside Triton's own, machine code beside what is packed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vpd_fast._startup import interrupt, set_handlers
from vpd_fast.bench import compilation, launches
from vpd_fast.bench.compilation import newest
from vpd_fast.bench.cubin_files import read_cubin
from vpd_fast.bench.engine_pass import MODELS
from vpd_fast.bench.operations import ValuesAreFine
from vpd_fast.cli.main import run
from vpd_fast.config import PRECISIONS
from vpd_fast.errors import InputError
from vpd_fast.kernels import cubins
from vpd_fast.kernels.cubins import Archive
from vpd_fast.kernels.specialization import layout, parse
from vpd_fast.models import checks
from vpd_fast.tasks import TASKS

from ..kernels.conftest import launcher, stub_of  # noqa: F401  fixtures

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton (Linux: pip install triton; the extra test brings it)",
)


@pytest.fixture(scope="module")
def passes(launcher, stub_of, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:  # noqa: F811
    """What `recorded_passes.py` found, in a process where kernels are compiled."""
    folder = tmp_path_factory.mktemp("passes")
    program = str(Path(__file__).with_name("recorded_passes.py"))
    return json.loads(compiling(folder, program, launcher.__file__, stub_of(12080).path, str(folder)))


def compiling(folder: Path, *arguments: str) -> str:
    """What Python prints with these arguments, where kernels are compiled. folder: for Triton's cache."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_covered_pass_needs_no_compilation(passes: dict[str, Any]) -> None:
    assert passes["launches"] > 500
    assert passes["missed"] == 0


def test_keys_are_what_triton_would_compile_anew_for(passes: dict[str, Any]) -> None:
    assert passes["keys"] > 100
    assert passes["disagreements"] == []


def test_the_number_of_images_needs_few_kernels_of_its_own(passes: dict[str, Any]) -> None:
    assert passes["of_three_images"] < passes["keys"] / 4


def test_the_assembler_says_what_is_packed(passes: dict[str, Any]) -> None:
    for key, found in passes["compiled"].items():
        assert found["cubin"] == found["packed"], key


def test_a_kernel_that_takes_its_parameters_elsewhere_is_refused(passes: dict[str, Any]) -> None:
    assert "cannot be launched without Triton: CubinInfo(name='_image_range_kernel'" in passes["refusal"]


@pytest.mark.slow
def test_an_archive_of_a_full_model(tmp_path: Path) -> None:
    """What the depth model launches in bfloat16: the assembler says of each kernel what is packed."""
    path = tmp_path / "cubins.zip"
    options = ("--task", "depth", "--precision", "bf16", "--batch", "1", "--size", "512", "--arch", "sm_90")
    compiling(tmp_path, "-m", "vpd_fast", "compile-kernels", *options, "--out", str(path))
    archive = Archive.read(path)
    entries = archive.entries["sm_90"]
    assert len(entries) > 50
    for key, entry in entries.items():
        info, (packing, offsets) = read_cubin(archive.cubin(entry)), layout(key, archive.scratch)
        assert [at for at, _ in info.parameters] == offsets, key
        assert (info.size, info.threads) == (packing.size, entry.threads), key
        assert info.threads == 32 * int(parse(key)[2].get("num_warps", 4)), key
    assert path.stat().st_size < 10_000 * len(entries)


@pytest.mark.slow
@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_first_calls_compile_nothing(launcher, stub_of, tmp_path: Path, precision: str) -> None:  # noqa: F811
    """All tasks, 1 to 16 images of 512 pixels, on each GPU that kernels are compiled for."""
    program, archive = str(Path(__file__).with_name("first_calls.py")), str(tmp_path / "cubins.zip")
    arguments = (program, launcher.__file__, stub_of(12080).path, archive, "--precision", precision)
    found = json.loads(compiling(tmp_path, *arguments))
    assert found["missed"] == {}
    assert set(found["launches"]) == {"sm_80", "sm_90"}  # in fp8, too: sm_80 has the layers of more bits
    assert min(found["launches"].values()) > 1_000


def test_sources_that_change_meanwhile_make_an_archive_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = compilation.Compiled(b"machine code", 32, 0, 2, "3.6.0", "12.8")

    def compile_all(*_: Any) -> dict[tuple[str, str], compilation.Compiled]:
        monkeypatch.setattr(cubins, "hash_of_sources", lambda: "changed")
        return {("sm_90", "key"): kernel}

    for name, replacement in (("require_triton", lambda: None), ("choose_assembler", lambda _: None)):
        monkeypatch.setattr(compilation, name, replacement)
    monkeypatch.setattr(compilation, "compile_all", compile_all)
    monkeypatch.setattr(compilation, "jobs_of", lambda *_: [])
    before, lines = cubins.hash_of_sources(), []
    compilation.compile_kernels(tmp_path / "cubins.zip", [], ["sm_90"], 1, None, lines.append)
    archive = Archive.read(tmp_path / "cubins.zip")
    assert (archive.sources, archive.cubin(archive.entries["sm_90"]["key"])) == (before, b"machine code")
    assert lines[-1].startswith("1 kernels, 0.0 MB, for drivers of CUDA 12 and later: ")


def test_workers_end_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    def handlers(*_: str) -> Any:
        return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    monkeypatch.setattr(compilation, "compile_kernel", handlers)
    before = set_handlers(interrupt)
    try:
        found: Any = compilation.compile_all([("sm_90", "key")], 1, lambda _: None)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert found["sm_90", "key"] == (signal.SIG_IGN, signal.SIG_DFL)


def test_what_is_measured_by_default_is_compiled() -> None:
    """`vpd-fast bench`, layers.py and gpu.sh: all precisions, int8 with static rows too, 512 pixels, 1 and 8 images."""
    known = set(launches.configurations())
    assert {task for task in ("segmentation", "referring", "depth")} == {c.config.task for c in known}
    for model in launches.MODELS:
        for precision in ("fp32", "bf16", "fp16", "int8", "fp8"):
            for batch in (1, 2, 4, 8, 16):
                assert launches.Configuration(model, precision, batch, 512) in known
                static = launches.Configuration(model, precision, batch, 512, static_rows=True)
                assert (static in known) == (precision == "int8")


@pytest.mark.slow
@pytest.mark.parametrize("task", [task for task in TASKS if task != "segmentation"])
def test_other_tasks_are_recorded_without_memory(task: str) -> None:
    """Checks of values are passed by; `recorded_passes.py` records the first task."""
    model, launched = launches.EmptyModel(dataclasses.replace(MODELS["small"], task=task), "fp32"), []
    model.record(1, 64, lambda architecture, *_: launched.append(architecture), ["sm_90"])
    assert len(launched) > 200


def test_scenes_without_values_are_recorded() -> None:
    scenes = torch.empty(2, dtype=torch.long, device="meta")
    with ValuesAreFine():
        checks.class_ids(scenes, 27, scenes.device)


def test_versions_are_compared_as_numbers() -> None:
    assert newest(["12.8", "12.10", "9.2"]) == "12.10"


@pytest.mark.parametrize("image", [b"", b"\x7fELF\x01\x01" + bytes(60), b"MZ" + bytes(90)])
def test_what_is_no_cubin_is_refused(image: bytes) -> None:
    with pytest.raises(InputError, match="no cubin"):
        read_cubin(image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arch", "sm_70"], "--arch must be one of sm_80, sm_90, got 'sm_70'"),
        (["--precision", "int4"], "--precision must be one of fp32, bf16, fp16, int8, fp8, got 'int4'"),
        (["--task", "all"], "--task must be one of segmentation, referring, depth, got 'all'"),
        (["--size", "500"], "--size must be a positive multiple of 64, got 500"),
        (["--batch", "0"], "--batch must be positive, got 0"),
        (["--jobs", "-1"], "--jobs must not be negative, got -1"),
    ],
)
def test_wrong_options_are_one_error(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compile-kernels", *options]) == 2
    assert message in capsys.readouterr().err


def test_kernels_that_are_interpreted_cannot_be_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert run(["compile-kernels"]) == 2
    assert "TRITON_INTERPRET=1 has kernels interpreted" in capsys.readouterr().err
