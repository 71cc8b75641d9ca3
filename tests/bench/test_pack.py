"""benchmarks/pack.py: what is in the folder, how large it may be, and that `gpu.sh measure` runs from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Stands for Python: builds a "wheel", compiles "kernels", installs by unpacking, and notes all that it is asked.
PYTHON = """#!/usr/bin/env bash
echo "$CMAKE_ARGS|$VPD_FAST_CUDA$VPD_FAST_PROBES|$PYTHONPATH|$*" >>"$LOG"
case "$*" in
"-c import importlib.metadata"*) echo "$INSTALLED" ;;
"-c import sys; print('cp"*) echo cp312 ;;
"-c import sys; print"*) echo 3.12 ;;
*"pip wheel"*)
    while [[ $1 != -w ]]; do shift; done
    mkdir -p "$2"
    echo wheel >"$2/vpd_fast-1-cp312-cp312-linux_x86_64.whl"
    ;;
*"pip install"*triton==9*) exit 1 ;;
*compile-kernels*) while [[ $1 != --out ]]; do shift; done; echo cubins >"$2" ;;
*"pip install"*) while [[ $1 != --target ]]; do shift; done; mkdir -p "$2/vpd_fast/kernels" ;;
esac
exit 0
"""


@pytest.fixture
def stub(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "stub"
    path.write_text(PYTHON)
    path.chmod(0o755)
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("INSTALLED", "3.6.0")
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    return path


def test_the_folder_has_all_that_is_needed(script, stub: Path, tmp_path) -> None:
    folder = tmp_path / "packed"
    script("pack").main([str(folder), "--python", str(stub), "--kernels", str(stub), "--batch", "1", "8"])
    facts = json.loads((folder / "pack.json").read_text())
    assert (facts["wheel"], facts["kernels"]) == (
        "vpd_fast-1-cp312-cp312-linux_x86_64.whl",
        "Triton 3.6.0, batches 1, 8",
    )
    assert facts["bytes"] < 60 << 20
    for name in ("wheel/" + facts["wheel"], "kernels/cubins.zip", "benchmarks/gpu.sh", "tests/conftest.py"):
        assert (folder / name).is_file()
    assert not (folder / "benchmarks/results").exists()
    assert not list(folder.rglob("__pycache__"))
    asked = (tmp_path / "log").read_text()
    assert "-DVPD_FAST_CUDA_CODE=arch=compute_90a,code=sm_90a|ONON|" in asked
    assert "compile-kernels --arch sm_90 --task segmentation --size 512 --out" in asked
    assert "--batch 1 --batch 8" in asked

    environment = {**os.environ, "PYTHON": str(stub), "OUT": str(tmp_path / "out")}
    environment.pop("PYTHONPATH", None)
    (tmp_path / "log").write_text("")
    command = ["bash", str(folder / "benchmarks/gpu.sh"), "measure"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "site/vpd_fast/kernels/cubins.zip").read_text() == "cubins\n"
    lines = (tmp_path / "log").read_text().splitlines()
    (installed,) = (line for line in lines if "pip install" in line)
    assert "--no-index --no-deps" in installed
    (measured,) = (line for line in lines if "benchmarks/measure.py" in line)
    assert measured.startswith(f"||{folder}/site:{folder}|")
    assert not any("pip install" in line and " -e " in line for line in lines)


def test_kernels_are_compiled_at_run_time_if_that_is_wanted(script, stub: Path, tmp_path) -> None:
    script("pack").main([str(tmp_path / "packed"), "--python", str(stub), "--kernels", "none"])
    assert "compiled at run time" in json.loads((tmp_path / "packed/pack.json").read_text())["kernels"]


def test_another_triton_than_the_installed_one_is_fetched_once(script, stub: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("INSTALLED", "3.9.0")
    pack, cache = script("pack"), tmp_path / "cache"
    for name in ("first", "second"):
        pack.main([str(tmp_path / name), "--python", str(stub), "--kernels", str(stub), "--cache", str(cache)])
    lines = (tmp_path / "log").read_text().splitlines()
    (fetched,) = (line for line in lines if "pip install" in line)
    assert fetched.endswith("triton==3.6.0")
    assert "--no-deps" in fetched
    for compiled in (line for line in lines if "compile-kernels" in line):
        assert compiled.startswith(f"||{cache}/triton-3.6.0-cp312:{ROOT}|")
    assert [path.name for path in cache.iterdir()] == ["triton-3.6.0-cp312"]

    pack.main([str(tmp_path / "third"), "--python", str(stub), "--kernels", str(stub), "--triton", "installed"])
    assert f"||{ROOT}|-m vpd_fast compile-kernels" in (tmp_path / "log").read_text()
    with pytest.raises(SystemExit, match=r"Triton 9.9 failed; --triton installed takes 3.9.0; --kernels none leaves"):
        pack.main([str(tmp_path / "4"), "--python", str(stub), "--kernels", str(stub), "--triton", "9.9",
                   "--cache", str(cache)])  # fmt: skip
    assert [path.name for path in cache.iterdir()] == ["triton-3.6.0-cp312"]
    assert not (tmp_path / "4").exists()


@pytest.mark.parametrize(("missing", "message"), [
    ("torch", "has no PyTorch, which the kernels are compiled with .*: No module named 'torch'; --kernels none leaves"),
    ("triton", "has no Triton that compiles the kernels: No module named 'triton'; --kernels none leaves"),
])  # fmt: skip
def test_a_piece_that_is_missing_is_named(script, stub: Path, tmp_path, missing: str, message: str) -> None:
    fails = f'[[ "$*" == "-c import {missing}"* ]] && {{ echo "No module named \'{missing}\'" >&2; exit 1; }}\n'
    other = tmp_path / "other"
    other.write_text(PYTHON.replace("case", fails + "case", 1))
    other.chmod(0o755)
    with pytest.raises(SystemExit, match=message):
        script("pack").main([str(tmp_path / "packed"), "--python", str(stub), "--kernels", str(other)])
    assert not (tmp_path / "packed").exists()


def test_a_folder_that_is_too_large(script, tmp_path) -> None:
    (tmp_path / "large").write_bytes(bytes(3 << 20))
    with pytest.raises(SystemExit, match=r"has 3 MiB, allowed are 2; the largest are large \(3 MiB\)"):
        script("pack").check_size(tmp_path, 2 << 20)


def test_what_pack_refuses(script, stub: Path, tmp_path) -> None:
    with pytest.raises(SystemExit, match="is there already"):
        script("pack").main([str(tmp_path)])
    with pytest.raises(SystemExit, match="--python 3.99: there is no such interpreter"):
        script("pack").main([str(tmp_path / "new"), "--python", "3.99"])
    stub.write_text("#!/usr/bin/env bash\n[[ $1 == -c ]] && echo 3.12 || exit 5\n")
    with pytest.raises(SystemExit, match="wheel failed"):
        script("pack").main([str(tmp_path / "new"), "--python", str(stub)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stub"]


def test_gpu_sh_hands_pack_its_arguments() -> None:
    command = ["bash", str(ROOT / "benchmarks/gpu.sh"), "pack", "--help"]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0
    assert "--python" in done.stdout
