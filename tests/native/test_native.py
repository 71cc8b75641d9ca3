"""Loading of the compiled modules, the choice of the instruction set level, and what the objects contain."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vpd_fast import _native
from vpd_fast.errors import InputError, MissingDependencyError

LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")
CSRC = Path(__file__).parents[2] / "csrc"


def test_the_fastest_level_is_the_default(monkeypatch) -> None:
    monkeypatch.delenv("VPD_FAST_ISA", raising=False)
    assert _native.isa() == _native.load("_C").usable_isas()[-1]


def test_the_environment_chooses_the_level(monkeypatch) -> None:
    usable = _native.load("_C").usable_isas()
    assert usable[0] == "baseline"
    assert [level for level in LEVELS if level in usable] == usable
    for level in usable:
        monkeypatch.setenv("VPD_FAST_ISA", level)
        assert _native.isa() == level


def test_an_unknown_level_is_an_error_that_lists_the_possible(monkeypatch) -> None:
    monkeypatch.setenv("VPD_FAST_ISA", "sse9")
    with pytest.raises(InputError, match="VPD_FAST_ISA: instruction set 'sse9' is unknown.* usable here: baseline"):
        _native.isa()


def test_a_missing_module_is_explained(monkeypatch) -> None:
    monkeypatch.setitem(_native.MODULES, "_C_absent", "build it")
    assert re.search(r"vpd_fast\._C_absent cannot be loaded \(.*\); build it", _native.why_missing("_C_absent"))
    with pytest.raises(MissingDependencyError, match="_C_absent cannot be loaded"):
        _native.load("_C_absent")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_weights": [0.5, 0.6]}, "must add up to 1"),
        ({"row_weights": [1.5, -0.5]}, "must be positive"),
        ({"row_sources": [0, 2]}, "index out of range"),
        ({"row_sources": [1, 0]}, "must ascend"),
        ({"row_offsets": [0, 1]}, "do not cover"),
        ({"row_weights": [1.0]}, "do not fit together"),
        ({"shape": (1, 1, 1, 0, 2, 2)}, "must be positive"),
    ],
)
def test_the_binding_checks_what_could_read_out_of_bounds(change: dict, message: str) -> None:
    import numpy as np
    import torch

    logits, labels = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 1, dtype=torch.int64)
    arguments = {"row_offsets": [0, 2], "row_sources": [0, 1], "row_weights": [0.5, 0.5], "shape": (1, 1, 1, 1, 2, 2)}
    arguments |= change
    types = {"offsets": np.int64, "sources": np.int32, "weights": np.float32}
    arrays = {f"row_{name}": np.array(arguments[f"row_{name}"], dtype) for name, dtype in types.items()}
    columns = {
        f"column_{name}": np.array(value, types[name])
        for name, value in (("offsets", [0, 1]), ("sources", [0]), ("weights", [1.0]))
    }
    with pytest.raises(ValueError, match=message):
        _native.load("_C").upsample_argmax(
            logits=logits.data_ptr(),
            shape=arguments["shape"],
            strides=(4, 4, 4, 2, 1),
            labels=labels.data_ptr(),
            threads=1,
            **arrays,
            **columns,
        )


def test_kernels_know_no_torch() -> None:
    sources = [path for path in CSRC.rglob("*") if path.is_file()]
    assert sources
    for path in sources:
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path


def compile_object(source: Path, level: str, folder: Path) -> Path:
    flags = {"baseline": [], "avx2": ["-mavx2", "-mfma", "-mf16c"]}
    flags["avx512"] = [*flags["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
    flags["avx512_bf16"] = [*flags["avx512"], "-mavx512bf16", "-mavx512vnni"]
    built = folder / f"{source.stem}.{level}.o"
    define = f"-DVPD_ISA={level}"
    command = ["g++", "-std=c++17", "-O3", "-w", "-march=x86-64", *flags[level], define, f"-I{CSRC}", "-fPIC"]
    subprocess.run([*command, "-c", str(source), "-o", str(built)], check=True)
    return built


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("g++") and shutil.which("objdump")) or _native.load("_C").build_info["isa_levels"] == "baseline",
    reason="needs g++ and objdump on x86-64",
)
@pytest.mark.parametrize("source", sorted((CSRC / "cpu").glob("*.cpp")), ids=lambda path: path.stem)
def test_each_level_contains_only_its_own_instructions(source: Path, tmp_path: Path) -> None:
    """Nor does it share functions with other levels: of a weak symbol the linker keeps one, maybe the wrong one."""
    registers = {"baseline": None, "avx2": "ymm", "avx512": "zmm", "avx512_bf16": "zmm"}
    for level, expected in registers.items():
        built = compile_object(source, level, tmp_path)
        code = subprocess.run(["objdump", "-d", str(built)], check=True, capture_output=True, text=True).stdout
        found = set(re.findall(r"%([yz]mm)\d", code))
        allowed = {None: set(), "ymm": {"ymm"}, "zmm": {"ymm", "zmm"}}[expected]
        assert found <= allowed, level
        assert expected is None or expected in found, level
        symbols = subprocess.run(["nm", "-C", str(built)], check=True, capture_output=True, text=True).stdout
        shared = [line for line in symbols.splitlines() if re.match(r"[0-9a-f]+ [WVu] ", line)]
        assert not shared, level


def test_the_installed_baseline_has_no_wide_registers() -> None:
    """Disassembles the functions of namespace vpd::baseline in the module that is installed."""
    if not shutil.which("objdump"):
        pytest.skip("needs objdump (Debian: binutils)")
    module = _native.load("_C").__file__
    code = subprocess.run(["objdump", "-dC", module], check=True, capture_output=True, text=True).stdout
    functions = re.split(r"\n(?=[0-9a-f]+ <)", code)
    baseline = [f for f in functions if "vpd::baseline::" in f.partition("\n")[0]]
    assert baseline
    assert not [f.partition("\n")[0] for f in baseline if re.search(r"%[yz]mm\d", f)]


def test_report_runs_and_names_what_is_missing() -> None:
    done = subprocess.run([sys.executable, "-m", "vpd_fast"], check=True, capture_output=True, text=True)
    for line in ("vpd_fast", "torch", "instruction set", "native _C ", "native _C_cuda", "GPU", "triton"):
        assert re.search(rf"^{line}", done.stdout, re.MULTILINE), line


def test_report_survives_a_wrong_override(monkeypatch) -> None:
    from vpd_fast import info

    monkeypatch.setenv("VPD_FAST_ISA", "sse9")
    assert "instruction set 'sse9' is unknown" in info.render(info.collect())
