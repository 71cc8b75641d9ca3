"""Which file's measurements a GPU goes by, and what becomes of files that are none."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from vpd_fast.errors import InputError
from vpd_fast.kernels import tables
from vpd_fast.kernels.tables import Gpu

H200, H100, A100 = Gpu("NVIDIA H200", (9, 0)), Gpu("NVIDIA H100 80GB HBM3", (9, 0)), Gpu("NVIDIA A100", (8, 0))
GPU = torch.device("cuda", 0)
CHOICE = {"operator": "linear", "key": "int8 1x1/1", "sizes": [64, 32, 32], "us": {"triton": 2.0, "cuda": 1}}
TILE = {name: 16 for name in tables.TILE}
CONFIG = {"key": "int8 1x1/1 n32 k32", "rows": 64, "config": TILE}
TABLE = {"device": "NVIDIA H200", "capability": [9, 0], "configs": [CONFIG], "choices": [CHOICE]}


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(tables.VARIABLE, raising=False)
    tables.forget()
    yield
    tables.forget()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Gpu], None]:
    """`machine(gpu)`: all GPUs are of that kind, and tables that come with the package are in the test's folder."""
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    return lambda gpu: monkeypatch.setattr(tables, "gpu_of", lambda device: gpu)


def write(path: Path, **changes: object) -> Path:
    path.write_text(json.dumps({**TABLE, **changes}))
    return path


def test_a_table_is_what_its_file_says(tmp_path: Path) -> None:
    table = tables.read(write(tmp_path / "t.json"))
    assert (table.gpu, table.capability) == H200
    assert table.configs == {"int8 1x1/1 n32 k32": {64: TILE}}
    ((key, (times,)),) = table.choices.items()
    assert key == ("linear", "int8 1x1/1")
    assert times.sizes == (64, 32, 32)
    assert list(times.microseconds.items()) == [("cuda", 1.0), ("triton", 2.0)]  # the fastest first


def test_a_gpu_has_the_table_of_its_name(machine, tmp_path: Path) -> None:
    machine(H100)
    write(tmp_path / "nvidia-h200.json")
    own = write(tmp_path / "nvidia-h100-80gb-hbm3.json", device=H100.name)
    found = tables.of_device(GPU)
    assert found.table is not None
    assert (found.table.path, found.words) == (own, own.name)


def test_or_that_of_another_with_the_same_compute_capability(machine, tmp_path: Path) -> None:
    write(tmp_path / "nvidia-a100.json", capability=[8, 0])
    write(tmp_path / "nvidia-h200.json")
    machine(H100)
    found = tables.of_device(GPU)
    assert found.table is not None
    assert found.table.path.name == "nvidia-h200.json"
    assert found.words == "nvidia-h200.json, which a NVIDIA H100 80GB HBM3 (compute capability 9.0) shares"


def test_or_none(machine, tmp_path: Path) -> None:
    write(tmp_path / "nvidia-h200.json")
    machine(A100)
    assert tables.of_device(GPU) == (None, "no table for NVIDIA A100 (compute capability 8.0)")
    tables.forget()
    machine(None)  # a tensor that only claims to be on a GPU
    assert tables.of_device(GPU) == (None, "there is no GPU cuda:0")


def test_the_file_that_the_environment_names(machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "nvidia-h200.json")
    mine = write(tmp_path / "mine", device="NVIDIA H20")
    monkeypatch.setenv(tables.VARIABLE, str(mine))
    machine(H200)
    found = tables.of_device(GPU)
    assert found.table is not None
    assert (found.table.path, found.words) == (mine, f"{mine} (VPD_FAST_TUNING)")
    monkeypatch.setenv(tables.VARIABLE, str(tmp_path / "none"))
    tables.forget()
    with pytest.raises(InputError, match="VPD_FAST_TUNING=.*none: there is no such file"):
        tables.of_device(GPU)


def test_a_table_of_another_gpu_is_left_aside(machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "foreign.json")
    monkeypatch.setenv(tables.VARIABLE, str(path))
    machine(A100)
    message = (
        r"foreign.json was measured on NVIDIA H200 \(compute capability 9.0\), not on NVIDIA A100 \(compute cap.*8.0"
    )
    with pytest.warns(UserWarning, match=message):
        assert tables.of_device(GPU) == (None, f"{path} is of another GPU")
    write(path, capability=None)
    tables.forget()
    with pytest.warns(UserWarning, match="foreign.json was measured on NVIDIA H200, not on"):
        assert tables.of_device(GPU).table is None


BAD = {
    "empty": "",
    "a list": "[]",
    "no key": '{"configs": [{"rows": 1, "config": {}}]}',
    "no rows": '{"configs": {"a": 1}}',
    "a tile without a size": json.dumps({"configs": [{**CONFIG, "config": {"BM": 64}}]}),
    "a tile of 0": json.dumps({"configs": [{**CONFIG, "config": {**TILE, "BM": 0}}]}),
    "a tile of half": json.dumps({"configs": [{**CONFIG, "config": {**TILE, "BM": 0.5}}]}),
    "no times": json.dumps({"choices": [{**CHOICE, "us": [1]}]}),
    "a time in words": json.dumps({"choices": [{**CHOICE, "us": {"cuda": "1"}}]}),
    "a time that is none": json.dumps({"choices": [{**CHOICE, "us": {"cuda": float("nan")}}]}),
    "sizes in words": json.dumps({"choices": [{**CHOICE, "sizes": "64"}]}),
    "a capability in words": json.dumps({"capability": "9.0"}),
    "too deep": "[" * 100_000,
    "bytes": b"\xff\xfe",
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_damaged_files(machine, tmp_path: Path, text: str | bytes) -> None:
    """One warning that names the file, and then the rules."""
    path = tmp_path / "nvidia-h200.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=r"nvidia-h200.json is no table of tuned configurations"):
        tables.read(path)
    machine(H200)
    with pytest.warns(UserWarning, match=r"nvidia-h200.json is no table .*; until then .* go by the rules"):
        assert tables.of_device(GPU) == (None, "nvidia-h200.json is damaged")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tables.of_device(torch.device("cuda", 1)) == (None, "nvidia-h200.json is damaged")


def test_a_library_was_a_configuration_once(tmp_path: Path) -> None:
    """Tables of earlier versions can be read; what they say of libraries is not a tile."""
    path = write(tmp_path / "old.json", configs=[{**CONFIG, "config": {"LIBRARY": 1}}, CONFIG], choices=[])
    assert tables.read(path).configs == {CONFIG["key"]: {64: TILE}}


def test_all_tables_of_the_package_can_be_read() -> None:
    paths = list(tables.FOLDER.glob("*.json"))
    assert "nvidia-h200.json" in [path.name for path in paths]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in paths:
            table = tables.read(path)
            assert table.capability is not None  # so that other GPUs may share it
            assert tables.slug(table.gpu) == path.stem
            assert table.choices
