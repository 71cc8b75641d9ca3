"""Runs commands in forked processes, so that the imports are paid once, and kills them at a chosen file operation.

Reads lines of JSON from standard input, {"arguments": [...], "folder": ..., "kill_at": N or null, "log": ...}, answers
each with {"code": exit code, negative for a signal, "operations": how many there were}. An operation is what changes a
file or folder in `folder`: opening to write, renaming, removing, making; the process is killed just before the N-th.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from typing import Any

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")


def watch(folder: str, kill_at: int | None, answer: int) -> None:
    """Count the operations of this process, tell each, and end it before number `kill_at`."""
    numbers = itertools.count(1)  # threads of the command take theirs from it one at a time

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in CHANGES:
            path = arguments[0]
        else:
            return
        if not isinstance(path, str | bytes | os.PathLike) or not os.fsdecode(path).startswith(folder):
            return
        number = next(numbers)
        os.write(answer, b".")  # lets other threads run
        if number == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def run(request: dict[str, Any]) -> dict[str, int]:
    """Run a command in a process of its own, and return how it ended."""
    told, answer = os.pipe()
    process = os.fork()
    if not process:
        os.close(told)
        code = 70
        try:
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            watch(request["folder"], request["kill_at"], answer)
            from vpd_fast.cli.main import run as command

            code = command(request["arguments"])
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(answer)
    operations = 0
    while read := os.read(told, 65536):
        operations += len(read)
    os.close(told)
    _, status = os.waitpid(process, 0)
    return {"code": os.waitstatus_to_exitcode(status), "operations": operations}


def main() -> None:
    """Import what the commands need, then serve."""
    import accelerate  # noqa: F401
    import torch
    import torch._dynamo  # by optimizers, when they are used first

    import vpd_fast.cli.main
    import vpd_fast.training.trainer  # noqa: F401

    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
