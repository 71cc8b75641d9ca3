"""One run at a time in a folder, and none kept out by a run that was killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vpd_fast import locking
from vpd_fast.errors import InputError
from vpd_fast.locking import RunLock

HOLD = """
import sys, time
from vpd_fast.locking import RunLock
lock = RunLock(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


def test_a_run_of_another_process_keeps_others_out_until_it_is_killed(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        message = rf"another run \(process {process.pid} on {socket.gethostname()}\) writes there; wait for its end"
        with pytest.raises(InputError, match=message):
            RunLock(path)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert path.exists()
    with RunLock(path):
        assert json.loads(path.read_text()) == {"pid": os.getpid(), "host": socket.gethostname()}
    assert not path.exists()


def test_released_and_taken_again(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / ".lock")
    with pytest.raises(InputError, match="another run of this process"):
        RunLock(tmp_path / ".lock")
    lock.release()
    lock.release()
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path / ".lock"):
        raise ZeroDivisionError
    with RunLock(tmp_path / ".lock"):
        (tmp_path / ".lock").unlink()  # with its folder, say
        (tmp_path / ".lock").write_text("of another run")
    assert (tmp_path / ".lock").read_text() == "of another run"


@pytest.mark.parametrize("content", ["", "x", "[1]", '{"pid": "a", "host": 1}', "[" * 4000])
def test_files_that_say_nothing_lock_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / ".lock").write_text(content)
    RunLock(tmp_path / ".lock").release()


def test_where_the_file_system_has_no_locks_the_process_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locking, "_lock", lambda file: None)
    path, here = tmp_path / ".lock", socket.gethostname()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for holder, free in (((ended.pid, here), True), ((os.getppid(), here), False), ((ended.pid, "elsewhere"), False)):
        path.write_text(json.dumps({"pid": holder[0], "host": holder[1]}))
        if free:
            RunLock(path).release()
        else:
            with pytest.raises(InputError, match=rf"process {holder[0]} on {holder[1]}") as error:
                RunLock(path)
            assert (f"if it has ended, remove {path}" in str(error.value)) == (holder[1] != here)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.lock: cannot be written"):
        RunLock(tmp_path / "missing" / ".lock")
