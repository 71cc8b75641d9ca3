"""Peak memory of loading, measured in a fresh process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vpd_fast import VPD, BackboneConfig, VPDConfig
from vpd_fast.checkpoints import convert, save_pretrained

CONFIG = VPDConfig(num_classes=20, backbone=BackboneConfig(model_channels=160, num_heads=8))
MEBIBYTE = 2**20

# VmHWM, as ru_maxrss would start from the parent's peak.
PROGRAM = """
import sys
from vpd_fast.checkpoints import load_checkpoint

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))

start = peak()
model = load_checkpoint(sys.argv[1], mmap=sys.argv[2] == "mapped")
loaded = peak()
total = sum(float(p.sum()) for p in model.parameters())
print(loaded - start, peak() - start)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of about 900 MB in several formats."""
    folder = tmp_path_factory.mktemp("large")
    model = VPD.empty(CONFIG).to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(1)
    save_pretrained(model, folder / "pretrained")
    convert(folder / "pretrained", folder / "zip.pth", to="vpd")
    convert(folder / "pretrained", folder / "half.pth", to="vpd", dtype=torch.float16)
    torch.save(model.state_dict(), folder / "legacy.pth", _use_new_zipfile_serialization=False)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    ("name", "how", "most"),
    [
        ("pretrained", "mapped", 1.05),  # looking for NaN brings the pages in, which the system may drop again
        ("zip.pth", "mapped", 1.05),
        ("pretrained", "read", 1.05),
        ("zip.pth", "read", 1.05),
        ("legacy.pth", "read", 1.05),
        ("half.pth", "read", 1.55),  # the float32 copy and the mapped float16 original
    ],
)
def test_peak_memory(folder: Path, name: str, how: str, most: float) -> None:
    size = (folder / "zip.pth").stat().st_size / MEBIBYTE
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder / name), how], capture_output=True, text=True, check=True
    )
    loaded, used = (float(value) for value in result.stdout.split())
    print(f"{name}: {size:.0f} MiB of weights, {loaded:.0f} MiB after loading, {used:.0f} MiB at most")
    assert used > 0.9 * size  # the measurement sees the weights
    assert loaded < most * size
    assert used < most * size
