"""Kernels compiled ahead of time: keys, packed parameters, the archive, and what happens where it cannot be used."""

from __future__ import annotations

import json
import struct
import warnings
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from vpd_fast import _native
from vpd_fast.errors import InputError, MissingDependencyError
from vpd_fast.kernels import cubins
from vpd_fast.kernels.specialization import layout, parse, specialize


class Parameter(NamedTuple):
    name: str
    is_constexpr: bool = False
    do_not_specialize: bool = False
    do_not_specialize_on_alignment: bool = False


class Kernel:
    """What `triton.jit` makes, as far as launches look at it."""

    params = (
        *(Parameter("x"), Parameter("y"), Parameter("missing"), Parameter("n"), Parameter("one"), Parameter("big")),
        Parameter("varying", do_not_specialize=True),
        Parameter("size", do_not_specialize_on_alignment=True),
        *(
            Parameter("eps"),
            Parameter("flag"),
            Parameter("BLOCK", is_constexpr=True),
            Parameter("NAME", is_constexpr=True),
        ),
    )
    __module__, __name__ = "vpd_fast.kernels._fake", "_kernel"


def arguments(**changes: Any) -> dict[str, Any]:
    memory = torch.zeros(64, dtype=torch.bfloat16)
    values = {"x": memory, "y": memory[1:], "missing": None, "n": 32, "one": 1, "big": 2**40, "varying": 1, "size": 16}
    return values | {"eps": 0.5, "flag": True, "BLOCK": 128, "NAME": "geglu", "num_warps": 8, "num_stages": 3} | changes


KEY = (
    "_fake._kernel(*bf16:16, *bf16, =None, i32:16, =1, i64:16, i32, i32, fp32, u1, =128, ='geglu')"
    " num_stages=3 num_warps=8"
)


def test_a_key_says_what_triton_compiles_a_kernel_anew_for() -> None:
    key, values = specialize(Kernel(), arguments())
    assert key == KEY
    assert values[2:] == [32, 2**40, 1, 16, 0.5, True]
    kernel, tokens, options = parse(key)
    assert (kernel, tokens[-1], options) == ("_fake._kernel", "='geglu'", {"num_stages": "3", "num_warps": "8"})


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"varying": 16}, True),
        ({"varying": 7}, True),
        ({"varying": 2**31}, False),  # does not fit 32 bits
        ({"size": 17}, True),
        ({"size": 1}, False),
        ({"n": 33}, False),
        ({"n": 1}, False),
        ({"n": 0}, True),
        ({"eps": 1.0}, True),
        ({"flag": False}, True),
        ({"x": torch.zeros(1)}, False),
        ({"missing": torch.zeros(1)}, False),
        ({"BLOCK": True}, False),  # equal to 1, and compiled otherwise
        ({"num_warps": 4}, False),
    ],
)
def test_which_launches_share_machine_code(changes: dict[str, Any], same: bool) -> None:
    assert (specialize(Kernel(), arguments(**changes))[0] == KEY) == same


def test_parameters_lie_as_in_a_structure_of_c() -> None:
    packing, offsets = layout(KEY, 2)
    assert offsets == [0, 8, 16, 24, 32, 36, 40, 44, 48, 56]
    assert packing.size == 64


def write(path: Path, keys: dict[str, tuple[int, int]], architecture: str = "sm_90", **changes: Any) -> None:
    """An archive whose kernels are no machine code."""
    files = {f"{architecture}/{i}.cubin": b"\x7fELF" + bytes([i]) * 2000 for i in range(len(keys))}
    rows = {key: (name, *how) for (key, how), name in zip(keys.items(), files, strict=True)}
    index = {"format": 1, "sources": cubins.hash_of_sources(), "triton": "3.6.0", "cuda": "12.8", "scratch": 2}
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("index.json", json.dumps(index | {"kernels": {architecture: rows}} | changes))
        for name, content in files.items():
            file.writestr(name, content)


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: ModuleType, stub) -> Path:
    """An archive with the kernel of `KEY`, in place of the installed one, and the stub in place of the driver."""
    path = tmp_path / "cubins.zip"
    write(path, {KEY: (256, 60000)})
    monkeypatch.setattr(cubins, "ARCHIVE", path)
    monkeypatch.setattr(cubins, "DRIVER", stub.path)
    monkeypatch.setattr(_native, "why_missing", lambda name: None)
    monkeypatch.setattr(_native, "load", lambda name: launcher)
    monkeypatch.delenv("VPD_FAST_CUBINS", raising=False)
    return path


def open_quietly(capability: tuple[int, int] = (9, 0)) -> cubins.Table:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = cubins.open_table(capability)
    assert table is not None
    return table


def test_a_launch_reaches_the_driver_byte_for_byte(archive: Path, stub) -> None:
    table, values = open_quietly(), arguments()
    stub.expect(8, 8, 4, 8, 4, 4, 4, 1, 8, 8)
    assert table.launch(Kernel(), (7, 3), values, 1, 0xABC)
    assert table.launch(Kernel(), (0,), values, 1, 0), "no blocks are no launch"
    assert table.launch(Kernel(), (2, 1, 5), values, 0, 0)
    x = values["x"].data_ptr()
    packed = [struct.pack(f"<{form}", value).hex() for form, value in zip(
        "QQiqiif?QQ", (x, x + 2, 32, 2**40, 1, 16, 0.5, True, 0, 0), strict=True)]  # fmt: skip
    assert stub.launches() == [
        ["1", "0xabc", "_kernel", "7,3,1", "256", "60000", *packed],
        ["0", "(nil)", "_kernel", "2,1,5", "256", "60000", *packed],
    ]


def test_parameters_of_another_size_are_refused(launcher: ModuleType, stub) -> None:
    cubin = launcher.Driver(stub.path).cubin(b"\x7fELF", "f", 32, 0, [0, 8], 12)
    with pytest.raises(ValueError, match="parameters have 11 bytes, expected 12"):
        cubin.launch((1, 1, 1), bytes(11), 0, 0)


def test_what_is_missing_is_left_to_triton_with_one_note(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = open_quietly()
    with pytest.warns(UserWarning, match=r"num_warps=4 is not in it.*Triton compiles"):
        assert not table.launch(Kernel(), (1,), arguments(num_warps=4), 0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not table.launch(Kernel(), (1,), arguments(num_warps=2), 0, 0)
        assert table.launch(Kernel(), (1,), arguments(), 0, 0)
    monkeypatch.setenv("VPD_FAST_CUBINS", "only")
    with pytest.raises(MissingDependencyError, match=r"VPD_FAST_CUBINS=only, but .*num_warps=2 is not in it"):
        open_quietly().launch(Kernel(), (1,), arguments(num_warps=2), 0, 0)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flip(path: Path) -> None:
    """Damages the machine code, of which there is a checksum."""
    data = bytearray(path.read_bytes())
    data[data.index(b"\x7fELF") + 100] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("change", [flip, lambda path: write(path, {KEY: (256, 10**6)})], ids=["damaged", "memory"])
def test_a_kernel_that_does_not_load_is_left_to_triton(archive: Path, change) -> None:
    change(archive)
    table = open_quietly()
    with pytest.warns(UserWarning, match=r"(is damaged|the driver does not load).*Triton compiles"):
        assert not table.launch(Kernel(), (1,), arguments(), 0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not table.launch(Kernel(), (1,), arguments(), 0, 0)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9)])
def test_gpus_run_machine_code_of_their_major_version(archive: Path, stub, capability: tuple[int, int]) -> None:
    """What needs more shared memory than they have, up to 163 KB as an A100, the driver refuses."""
    other = arguments(num_stages=5)
    write(archive, {KEY: (256, 99 << 10), specialize(Kernel(), other)[0]: (256, (99 << 10) + 4)}, "sm_80")
    stub.limit_shared(163 if capability == (8, 0) else 99)
    table = open_quietly(capability)
    assert table.launch(Kernel(), (3,), arguments(), 0, 0)
    if capability == (8, 0):
        assert table.launch(Kernel(), (3,), other, 0, 0)
        return
    with pytest.warns(UserWarning, match=r"the driver does not load .*num_stages=5.*Triton compiles"):
        assert not table.launch(Kernel(), (3,), other, 0, 0)
    assert [line[2:6] for line in stub.launches()] == [["_kernel", "3,1,1", "256", str(99 << 10)]]


def test_an_architecture_of_their_own_comes_first() -> None:
    """Machine code of another major version, for one GPU only (sm_90a) or for Jetsons (sm_87) is not taken over."""
    rows = {name: {KEY: cubins.Entry(f"{name}/0.cubin", 32, 0)} for name in ("sm_80", "sm_86", "sm_90")}
    full = cubins.Archive(Path("cubins.zip"), cubins.hash_of_sources(), "3.6.0", "12.8", 2, rows)
    expected = {"sm_80": "sm_80", "sm_86": "sm_86", "sm_89": "sm_80", "sm_90": "sm_90"}
    for architecture, taken in expected.items():
        assert full.entries_for(architecture, 12080)[KEY].file == f"{taken}/0.cubin"
    for architecture in ("sm_75", "sm_87", "sm_100", "sm_120"):
        with pytest.raises(
            cubins.UnusableError, match=f"this GPU is {architecture}, and it has kernels for sm_80, sm_"
        ):
            full.entries_for(architecture, 12080)


UNUSABLE = {
    "truncated": (truncate, "it is damaged"),
    "no archive": (lambda path: path.write_text("{}"), "it is damaged"),
    "index of another format": (lambda path: write(path, {}, format=2), "its format is 2"),
    "index without kernels": (lambda path: write(path, {}, kernels=None), "it is damaged"),
    "index with a wrong number": (lambda path: write(path, {KEY: (-1, 0)}), "-1 is no number of threads"),
    "file that is missing": (lambda path: write(path, {}, kernels={"sm_90": {KEY: ("x", 32, 0)}}), "files are missing"),
    "other sources": (lambda path: write(path, {}, sources="0" * 64), "other sources"),
    "other GPU": (lambda path: write(path, {}, kernels={"sm_80": {}}), "is sm_90, and it has kernels for sm_80"),
    "old driver": (lambda path: write(path, {}, cuda="13.1"), "is for CUDA 12.8, and it was assembled by CUDA 13.1"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), UNUSABLE.values(), ids=UNUSABLE)
def test_an_archive_that_cannot_be_used_says_what_is_instead(
    archive: Path, monkeypatch: pytest.MonkeyPatch, change, reason: str
) -> None:
    change(archive)
    check_fallback(monkeypatch, reason)


def check_fallback(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    with pytest.warns(UserWarning, match=f"are not used: .*{reason}.*Triton compiles kernels") as caught:
        assert cubins.open_table((9, 0)) is None
    assert len(caught) == 1
    monkeypatch.setenv("VPD_FAST_CUBINS", "only")
    with pytest.raises(MissingDependencyError, match=f"VPD_FAST_CUBINS=only.*{reason}"):
        cubins.open_table((9, 0))
    monkeypatch.setenv("VPD_FAST_CUBINS", "off")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cubins.open_table((9, 0)) is None


def test_a_missing_module_or_driver_says_what_is_used_instead(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cubins, "DRIVER", "libno-such-driver.so")
        check_fallback(patch, "the CUDA driver cannot be loaded: libno-such-driver.so")
    with monkeypatch.context() as patch:
        patch.setattr(_native, "load", lambda name: SimpleNamespace())
        check_fallback(patch, "of an older version")
    with monkeypatch.context() as patch:
        patch.setattr(_native, "why_missing", lambda name: "vpd_fast._C_cuda cannot be loaded (no such file)")
        check_fallback(patch, r"_C_cuda cannot be loaded \(no such file\)")


def test_without_an_archive_triton_compiles_as_ever(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cubins.open_table((9, 0)) is None
    assert cubins.summary().startswith("none")
    monkeypatch.setenv("VPD_FAST_CUBINS", "only")
    with pytest.raises(MissingDependencyError, match="there is no such file"):
        cubins.open_table((9, 0))
    monkeypatch.setenv("VPD_FAST_CUBINS", "sometimes")
    with pytest.raises(InputError, match="VPD_FAST_CUBINS must be one of off, only, or not set, got 'sometimes'"):
        cubins.open_table((9, 0))


def test_what_info_says_of_the_archive(archive: Path) -> None:
    assert cubins.summary() == "1 for sm_90; Triton 3.6.0, CUDA 12.8"
    write(archive, {}, sources="0" * 64)
    assert "made from other sources, and not used" in cubins.summary()
    truncate(archive)
    assert "is damaged" in cubins.summary()


def test_every_file_of_kernels_changes_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cubins, "FOLDER", tmp_path)
    hashes = set()
    for name, text in (("a.py", "x"), ("a.py", "y"), ("b.py", ""), ("c.txt", "")):
        (tmp_path / name).write_text(text)
        cubins.hash_of_sources.cache_clear()
        hashes.add(cubins.hash_of_sources())
    cubins.hash_of_sources.cache_clear()
    assert len(hashes) == 3


def test_a_launch_takes_the_compiled_kernel_first(archive: Path, stub, monkeypatch: pytest.MonkeyPatch) -> None:
    common = pytest.importorskip("vpd_fast.kernels._common")
    compiled = []

    class Jit(Kernel):
        __module__ = Kernel.__module__

        def __getitem__(self, grid: tuple[int, ...]):
            return lambda **arguments: compiled.append((grid, arguments["num_warps"]))

    device = torch.device("cuda", 0)
    on = SimpleNamespace(is_cuda=True, device=device, get_device=lambda: 0)
    monkeypatch.setattr(common, "INTERPRETED", SimpleNamespace(value=False))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=5))
    monkeypatch.setattr(torch.cuda, "device", lambda device: warnings.catch_warnings())
    cubins.table_for.cache_clear()
    try:
        common.launch(Jit(), (3,), on, **arguments())
        assert not compiled
        with pytest.warns(UserWarning, match="is not in it"):
            common.launch(Jit(), (4,), on, **arguments(num_warps=2))
    finally:
        cubins.table_for.cache_clear()
    assert compiled == [((4,), 2)]
    assert [line[:4] for line in stub.launches()] == [["0", "0x5", "_kernel", "3,1,1"]]
