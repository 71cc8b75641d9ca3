"""How long a pass takes when OpenMP's threads sleep or spin while they wait, on an idle machine and beside other work.

`python benchmarks/waiting.py [--threads 1 2] [--busy N]` prints a table: median and longest time of a pass of a bundled
miniature, for each policy and number of threads, alone and with N processes (default: one per processor) that compute.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

CHILD = """
import json, sys, time
import numpy as np, torch, vpd_fast
torch.set_num_threads(int(sys.argv[1]))
model = vpd_fast.optimize(vpd_fast.VPD.from_pretrained("shapes-segmentation"), sys.argv[2])
image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
model.predict(image)
times = []
for _ in range(int(sys.argv[3])):
    start = time.perf_counter()
    model.predict(image)
    times.append(time.perf_counter() - start)
print(json.dumps(times))
"""
BUSY = "while True: sum(range(10**6))"


def measure(policy: str, threads: int, precision: str, rounds: int) -> list[float]:
    """Return seconds of each pass, in a process of its own."""
    environment = {**os.environ, "OMP_WAIT_POLICY": policy, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", CHILD, str(threads), precision, str(rounds)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, cpus}), help="numbers of threads")
    parser.add_argument("--busy", type=int, default=cpus, help="processes that compute beside it")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    print(f"{'machine':<10}{'threads':>8}{'waiting':>10}{'median ms':>12}{'longest ms':>12}")
    for busy in (0, arguments.busy):
        others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
        try:
            time.sleep(1)
            for threads in arguments.threads:
                for policy in ("passive", "active"):
                    times = measure(policy, threads, arguments.precision, arguments.rounds)
                    state, median = "busy" if busy else "idle", statistics.median(times)
                    print(
                        f"{state:<10}{threads:>8}{policy:>10}{1e3 * median:>12.1f}{1e3 * max(times):>12.1f}", flush=True
                    )
        finally:
            for other in others:
                other.kill()
                other.wait()


if __name__ == "__main__":
    main()
