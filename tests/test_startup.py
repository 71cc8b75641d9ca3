"""What the command line does before PyTorch is imported: signals, and threads that suit the machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vpd_fast import _startup

# Stands in for PyTorch: tells that it is being imported, then takes long, and swallows what is raised in it.
SLOW_TORCH = """
import os, time
open(os.environ["IMPORTING"], "w").close()
for _ in range(600):
    try:
        time.sleep(0.1)
    except BaseException:
        pass
"""


def not_ignoring() -> None:
    """Undo what a shell does for jobs in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_importing_ends_at_once_and_silently(tmp_path: Path, number: int) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(SLOW_TORCH)
    importing = tmp_path / "importing"
    path = os.pathsep.join([str(tmp_path), str(Path(_startup.__file__).parents[1])])
    process = subprocess.Popen(
        [sys.executable, "-m", "vpd_fast", "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "IMPORTING": str(importing)}, preexec_fn=not_ignoring,
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not importing.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    assert process.communicate(timeout=30) == (b"", b"")
    assert process.returncode == 130


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        handlers = _startup.set_handlers(lambda number, frame: None)
        signal.signal(signal.SIGTERM, handlers[signal.SIGTERM])
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert list(handlers) == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGINT, before)


def test_only_the_command_line_is_prepared() -> None:
    for argv, expected in (("['vpd-fast', 'info']", True), ("['train.py']", False), ("['-m', 'torchrun']", False)):
        code = f"import sys; sys.argv = {argv}\nfrom vpd_fast import _startup\nprint(_startup.is_command_line())"
        # The file alone: the package would import PyTorch.
        code = code.replace("from vpd_fast import _startup", LOAD)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(expected), argv


LOAD = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("vpd_fast._startup", {str(_startup.__file__)!r})
_startup = importlib.util.module_from_spec(spec); spec.loader.exec_module(_startup)"""


def test_threads_are_no_more_than_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_startup, "cpu_share", lambda: None)
    assert _startup.thread_settings({}) == {}
    monkeypatch.setattr(_startup, "usable_cpus", lambda: 8)
    for share, threads in ((0.2, "1"), (1.0, "1"), (1.5, "2"), (7.5, "8")):
        monkeypatch.setattr(_startup, "cpu_share", lambda share=share: share)
        assert _startup.thread_settings({})["OMP_NUM_THREADS"] == threads
        assert "OMP_NUM_THREADS" not in _startup.thread_settings({"OMP_NUM_THREADS": "3"})
    monkeypatch.setattr(_startup, "cpu_share", lambda: 8.0)
    assert "OMP_NUM_THREADS" not in _startup.thread_settings({})


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("DOT", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def test_the_share_of_a_control_group(tmp_path: Path) -> None:
    own, root = tmp_path / "cgroup", tmp_path / "fs"
    own.write_text("0::/kubepods/pod1\n")
    assert _startup.cpu_share(str(root), str(own)) is None
    write(root, kubepods__cpuDOTmax="max 100000")
    assert _startup.cpu_share(str(root), str(own)) is None
    write(root, kubepods__cpuDOTmax="400000 100000", kubepods__pod1__cpuDOTmax="150000 100000")
    assert _startup.cpu_share(str(root), str(own)) == 1.5
    write(root, cpuDOTmax="50000 100000")  # in a container the root is its own group
    assert _startup.cpu_share(str(root), str(own)) == 0.5
    assert _startup.cpu_share(str(root), str(tmp_path / "nowhere")) is None


def test_the_share_of_a_control_group_of_version_1(tmp_path: Path) -> None:
    own, root = tmp_path / "cgroup", tmp_path / "fs"
    own.write_text("5:memory:/a\n4:cpu,cpuacct:/docker/1\n")
    names = {"cpu__docker__1__cpuDOTcfs_quota_us": "-1", "cpu__docker__1__cpuDOTcfs_period_us": "100000"}
    write(root, **names)
    assert _startup.cpu_share(str(root), str(own)) is None
    write(root, **{**names, "cpu__docker__1__cpuDOTcfs_quota_us": "200000"})
    assert _startup.cpu_share(str(root), str(own)) == 2.0
    (root / "cpu").rename(root / "cpu,cpuacct")
    assert _startup.cpu_share(str(root), str(own)) == 2.0


def test_python_does_not_end_while_gloo_may_wait_for_it(tmp_path: Path) -> None:
    """Of one of several processes, exit functions run and what was printed arrives, but no module is torn down."""
    program = f"""
import atexit, os, sys
import torch.distributed as distributed
from vpd_fast import _startup

class TornDown:
    def __del__(self, make=os.mkdir):
        make({str(tmp_path / "torn down")!r})

kept = TornDown()
atexit.register(lambda: print("exit functions ran"))
if len(sys.argv) > 1:
    distributed.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
print("done")
_startup.leave(3)
"""
    for arguments, torn_down in (["grouped"], False), ([], True):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (3, "done\nexit functions ran\n"), done.stderr
        assert (tmp_path / "torn down").exists() is torn_down
