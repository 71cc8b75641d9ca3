"""What importing the package loads, in fresh processes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAVY = ("triton", "transformers", "cv2", "typer", "rich", "diffusers", "xformers", "openvino", "matplotlib")


def in_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_nothing_heavy() -> None:
    printed = in_fresh_process(
        "import torch, sys, json; before = set(sys.modules); import vpd_fast, vpd_fast.ops;"
        "new = {n.partition('.')[0] for n in set(sys.modules) - before};"
        "print(json.dumps([sorted(new), torch.cuda.is_initialized(), sorted(n for n in sys.modules if '_C' in n "
        "and n.startswith('vpd_fast'))]))"
    )
    loaded, cuda_initialised, native = json.loads(printed)
    assert not set(HEAVY) & set(loaded)
    assert not cuda_initialised
    assert not native


def test_operators_are_registered_by_the_import() -> None:
    in_fresh_process("import vpd_fast, torch; torch.ops.vpd_fast.upsample_argmax.default")


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
