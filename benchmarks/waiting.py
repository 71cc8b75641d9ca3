"""How long a pass takes when OpenMP's threads sleep or spin while they wait, on an idle machine and beside other work.

`python benchmarks/waiting.py [--threads 1 2] [--busy N] [--spins N ...]` prints a table: median and longest time of a
pass of a bundled miniature, and the median as a multiple of the default's, for each policy and number of threads, alone
and with N processes (default: one per processor) that compute. Policies: what OpenMP does by itself, sleeping
("passive"), spinning ("active"), and spinning for a number of turns before they sleep (GOMP_SPINCOUNT; by itself
300,000).
A setting is worth being the command line's where it costs less than 3 % idle and gains beside other work.
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


SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")


def measure(policy: dict[str, str], threads: int, precision: str, rounds: int) -> list[float]:
    """Return seconds of each pass, in a process of its own. policy: variables of its environment."""
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    environment |= policy | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", CHILD, str(threads), precision, str(rounds)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--threads", type=int, nargs="+", default=[cpus], help="numbers of threads")
    parser.add_argument("--busy", type=int, default=cpus, help="processes that compute beside it")
    parser.add_argument("--spins", type=int, nargs="*", default=[1000, 10_000, 100_000], help="turns before sleeping")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--rounds", type=int, default=10, help="passes of a process")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each policy, in turn")
    arguments = parser.parse_args()
    policies = {"default": {}, **{name: {"OMP_WAIT_POLICY": name} for name in ("passive", "active")}}
    policies |= {f"spin {count}": {"GOMP_SPINCOUNT": str(count)} for count in arguments.spins}
    print(f"{'machine':<9}{'threads':>8}{'waiting':>14}{'median ms':>12}{'longest ms':>12}{'to default':>12}")
    for busy in (0, arguments.busy):
        others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
        try:
            time.sleep(1)
            for threads in arguments.threads:
                times: dict[str, list[float]] = {name: [] for name in policies}
                for _ in range(arguments.repeats):
                    for name, policy in policies.items():
                        times[name] += measure(policy, threads, arguments.precision, arguments.rounds)
                default = statistics.median(times["default"])
                for name, found in times.items():
                    median = statistics.median(found)
                    row = f"{'busy' if busy else 'idle':<9}{threads:>8}{name:>14}{1e3 * median:>12.1f}"
                    print(f"{row}{1e3 * max(found):>12.1f}{median / default:>12.2f}", flush=True)
        finally:
            for other in others:
                other.kill()
                other.wait()


if __name__ == "__main__":
    main()
