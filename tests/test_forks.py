"""Forked children neither wait for locks that nobody holds any more nor for threads that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from PIL import Image

from vpd_fast.forks import Lock
from vpd_fast.pictures.pillow_limits import pillow_limits

LIMIT = 300  # seconds, with other work beside


def script(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a script in a process whose own children may hang."""
    path = folder / "script.py"
    path.write_text(textwrap.dedent(text))
    environment = {name: value for name, value in os.environ.items() if "THREADS" not in name}
    return subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=LIMIT, cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "2"},
    )  # fmt: skip


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_lock_of_another_thread_is_free_in_a_child(reentrant):
    lock, taken, leave = Lock(reentrant), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            leave.wait(LIMIT)

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(LIMIT)
    child = os.fork()
    if not child:
        free = lock._lock.acquire(blocking=False)
        os._exit(0 if free else 1)
    assert os.waitpid(child, 0)[1] == 0
    leave.set()
    thread.join()


def test_pillows_limits_are_back_in_a_child():
    before = Image.MAX_IMAGE_PIXELS
    with pillow_limits():
        child = os.fork()
        if not child:
            restored = before == Image.MAX_IMAGE_PIXELS
            with pillow_limits():
                restored = restored and before != Image.MAX_IMAGE_PIXELS
            os._exit(0 if restored and before == Image.MAX_IMAGE_PIXELS else 1)
        assert os.waitpid(child, 0)[1] == 0
    assert before == Image.MAX_IMAGE_PIXELS


def test_children_of_a_process_that_reads_can_read(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    done = script(
        """
        import os, signal, threading
        from pathlib import Path
        from vpd_fast.pictures.masks import read_mask
        from vpd_fast.pictures.reading import read_image
        for _ in range(4):
            threading.Thread(target=lambda: [read_image("a.png") for _ in iter(int, 1)], daemon=True).start()
        hung = 0
        for _ in range(8):
            child = os.fork()
            if not child:
                signal.alarm(60)
                read_image("a.png"), read_mask(Path("a.png"))
                os._exit(0)
            hung += os.waitpid(child, 0)[1] != 0
        print(hung, flush=True)
        os._exit(0)
        """,
        tmp_path,
    )
    assert done.stdout == "0\n", done.stderr


def test_children_of_a_process_that_has_computed_compute_with_one_thread(tmp_path):
    done = script(
        """
        import os, signal, sys, warnings
        import cv2
        import numpy as np
        import torch
        import vpd_fast
        plain = vpd_fast.VPD.from_pretrained("shapes-segmentation")
        fast = vpd_fast.optimize(plain, "int8")
        image = np.full((64, 64, 3), 99, np.uint8)
        def compute():
            cv2.resize(np.zeros((2000, 2000, 3), np.uint8), (900, 900))
            return [model.predict(image).labels for model in (plain, fast)]
        labels = compute()
        assert torch.get_num_threads() > 1
        child = os.fork()
        if not child:
            signal.alarm(200)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                again = compute() + [result.labels for result in fast.predict([image] * 2, streams=2)]
            told = [w for w in caught if "spawn" in str(w.message)]
            same = all((a == b).mean() > 0.99 for a, b in zip(again, [*labels, labels[1], labels[1]], strict=True))
            os._exit(0 if same and torch.get_num_threads() == 1 and len(told) == 1 else 3)
        print(os.waitpid(child, 0)[1], torch.get_num_threads() > 1)
        """,
        tmp_path,
    )
    assert done.stdout == "0 True\n", done.stderr
