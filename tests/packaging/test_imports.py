"""What importing the package loads, in fresh processes."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from vpd_fast import _native

ROOT = Path(__file__).parents[2]
HEAVY = ("triton", "transformers", "cv2", "typer", "rich", "diffusers", "xformers", "openvino", "matplotlib")


def in_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_registers_the_operators_and_loads_nothing_heavy() -> None:
    printed = in_fresh_process(
        "import torch, sys, json; before = set(sys.modules); import vpd_fast, vpd_fast.ops;"
        "new = {n.partition('.')[0] for n in set(sys.modules) - before};"
        "print(json.dumps([sorted(new), torch.cuda.is_initialized(), sorted(n for n in sys.modules if '_C' in n "
        "and n.startswith('vpd_fast'))])); torch.ops.vpd_fast.upsample_argmax.default"
    )
    loaded, cuda_initialised, native = json.loads(printed)
    assert not set(HEAVY) & set(loaded)
    assert not cuda_initialised
    assert not native


def test_operators_work_without_native_modules() -> None:
    code = (
        "import sys; sys.modules['vpd_fast._C'] = None; sys.modules['vpd_fast._C_cuda'] = None\n"
        "import torch; from vpd_fast import ops\n"
        "x = torch.zeros(1, 2, 4, 4)\n"
        "assert ops.upsample_argmax(x, (8, 8)).shape == (1, 8, 8)\n"
        "print(ops.explain('upsample_argmax', x, (8, 8))['cpu'])"
    )
    assert "vpd_fast._C cannot be loaded" in in_fresh_process(code)


def test_the_checkout_hides_no_other_package_called_kernels(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("other = True")
    # The checkout comes first, as it does for `python -m pytest` and for a script beside kernels/.
    paths = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]\n"
    in_fresh_process(paths + "import kernels, vpd_fast.kernels; assert kernels.other")


def test_kernels_are_part_of_the_package() -> None:
    (folder,) = importlib.util.find_spec("vpd_fast.kernels").submodule_search_locations
    assert Path(folder).samefile(ROOT / "kernels")


# Who may use another package's private names: operators share the helpers of their kernels, and `bench` looks inside.
INSIDERS = {
    ("vpd_fast.ops", "vpd_fast.kernels"),
    ("vpd_fast.bench", "vpd_fast.ops._dispatch.registry"),
    ("vpd_fast.bench.choices", "vpd_fast.ops._dispatch"),
    ("vpd_fast.bench", "vpd_fast.kernels._library"),
    ("vpd_fast.bench.choices", "vpd_fast.kernels._gemm_cuda"),
    ("vpd_fast.bench", "vpd_fast.kernels._common.multiprocessors"),
}


def private_imports(path: Path) -> Iterator[tuple[str, str]]:
    """(importing module, imported name) of each name in `path` that is private to a package `path` does not lie in."""
    module = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("vpd_fast"):
            continue
        for alias in node.names:
            name = (*node.module.split("."), alias.name)
            private = (i for i, part in enumerate(name) if part.startswith("_") and not part.startswith("__"))
            if any(name[:i] != module[:i] for i in private):
                yield ".".join(module), ".".join(name)


def test_private_names_stay_in_their_package() -> None:
    paths = [*(ROOT / "vpd_fast").rglob("*.py"), *(ROOT / "vpd_fast" / "kernels").glob("*.py")]
    found = {pair for path in paths for pair in private_imports(path)}
    assert not {
        (module, name)
        for module, name in found
        if not any(f"{module}.".startswith(f"{insider}.") and name.startswith(of) for insider, of in INSIDERS)
    }


def test_kernels_import_no_operator() -> None:
    """`lint-imports` does not see kernels/, which has no __init__.py; arguments are named for types alone."""
    for path in (ROOT / "kernels").glob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("from vpd_fast"):  # at the start of a line: not below `if TYPE_CHECKING:`
                assert line.startswith(
                    ("from vpd_fast.kernels", "from vpd_fast.errors", "from vpd_fast import _native")
                )


@pytest.mark.parametrize(("module", "folder"), [("_C", "cpu"), ("_C_cuda", "cuda"), ("_C_probes", "probes")])
def test_native_modules_say_how_they_were_built(module: str, folder: str) -> None:
    """`vpd-fast info` and every record of a measurement ask for it; not each can be built everywhere."""
    assert module in _native.MODULES
    source = (ROOT / "csrc/bindings" / folder / "module.cpp").read_text()
    assert f"PYBIND11_MODULE({module}, m)" in source
    assert 'm.attr("build_info")' in source


def test_no_script_hides_a_library() -> None:
    """The folder of a script that is run comes first where Python looks for modules."""
    libraries = list({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
    folders = [ROOT / name for name in ("benchmarks", "examples", "examples/shapes")]
    scripts = [path for folder in folders for path in folder.glob("*.py")]
    assert scripts
    assert [path.name for path in scripts if PathFinder.find_spec(path.stem, libraries)] == []
