"""The plan for very many images, and a simulation that checks it: `python benchmarks/scale_simulation.py MEASURED`.

MEASURED is what `vpd-fast bench pipeline --json` wrote. The plan is arithmetic: of processors, device, network and
storage the slowest sets the pace. The simulation sends images through bounded queues and batches instead, so it would
show a pace that waiting spoils. Price, network and storage are assumptions, given as options.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import simpy

READING = ("read", "resize", "stack")
DRAWING = ("draw the overlay", "draw", "write overlay", "write the overlay")


@dataclass(frozen=True)
class Machine:
    """One device and what surrounds it. read_ms, write_ms: of a core, for an image; device_ms: of the device.

    kilobytes: read and written for an image; gigabits: per second of the network, for this device alone. files: that
    are opened for an image; files_per_second: that the storage opens, for this device alone.
    """

    read_ms: float
    write_ms: float
    device_ms: float
    cores: int
    kilobytes: float
    gigabits: float = 10.0
    files: float = 0.0
    files_per_second: float = 1000.0
    batch_size: int = 8
    ahead: int = 32

    @property
    def network_ms(self) -> float:
        """Milliseconds of the network for an image."""
        return self.kilobytes * 8e-3 / self.gigabits

    @property
    def storage_ms(self) -> float:
        """Milliseconds of the storage for an image."""
        return 1e3 * self.files / self.files_per_second

    def limits(self) -> dict[str, float]:
        """Return images per second by what would be the limit alone."""
        return {
            "processors": 1e3 * self.cores / (self.read_ms + self.write_ms),
            "device": 1e3 / self.device_ms,
            "network": 1e3 / self.network_ms,
            "storage": 1e3 / self.storage_ms if self.files else math.inf,
        }

    def pace(self) -> tuple[str, float]:
        """Return what breaks first, and the images per second that it allows."""
        return min(self.limits().items(), key=lambda limit: limit[1])


def measured(path: Path, overlay: str, device_ms: float, cores: int, **options: Any) -> Machine:
    """Return the machine that a measurement describes: its stages, scaled to the core-ms of the whole run."""
    found = json.loads(path.read_text())
    stages = found["stages_core_ms"]
    run = next(run for run in found["runs"] if run["overlay"] == overlay)
    kept = {name: ms for name, ms in stages.items() if overlay != "none" or name not in DRAWING}
    scale = run["core_ms"] / sum(kept.values())  # what threads cost beside their stages
    reading = scale * sum(ms for name, ms in kept.items() if name in READING)
    return Machine(reading, run["core_ms"] - reading, device_ms, cores, **options)


def simulate(machine: Machine, images: int) -> float:
    """Return images per second of simulated time; the first and the last fifth of the images do not count."""
    env = simpy.Environment()
    cores = simpy.Resource(env, machine.cores)
    network = simpy.Resource(env)
    storage = simpy.Resource(env)
    ready: simpy.Store = simpy.Store(env, machine.ahead)
    batches: simpy.Store = simpy.Store(env, 1)  # a device has its next batch before it ends one
    results: simpy.Store = simpy.Store(env, machine.ahead)
    left = iter(range(images))
    ends: list[float] = []

    def use(resource: simpy.Resource, ms: float) -> Generator[simpy.Event, Any, None]:
        with resource.request() as turn:
            yield turn
            yield env.timeout(ms)

    def reader() -> Generator[simpy.Event, Any, None]:
        for image in left:
            yield from use(storage, machine.storage_ms / 2)
            yield from use(network, machine.network_ms)
            yield from use(cores, machine.read_ms)
            yield ready.put(image)

    def collector() -> Generator[simpy.Event, Any, None]:
        for start in range(0, images, machine.batch_size):
            batch = []
            for _ in range(min(machine.batch_size, images - start)):
                batch.append((yield ready.get()))
            yield batches.put(batch)

    def device() -> Generator[simpy.Event, Any, None]:
        while True:
            batch = yield batches.get()
            yield env.timeout(machine.device_ms * len(batch))
            for image in batch:
                yield results.put(image)

    def writer() -> Generator[simpy.Event, Any, None]:
        while True:
            yield results.get()
            yield from use(cores, machine.write_ms)
            yield from use(storage, machine.storage_ms / 2)
            ends.append(env.now)

    for _ in range(2 * machine.cores):
        env.process(reader())
        env.process(writer())
    env.process(collector())
    env.process(device())
    env.run()
    first, last = len(ends) // 5, 4 * len(ends) // 5
    return 1e3 * (last - first) / (ends[last] - ends[first])


def main() -> None:
    """Print the plan as a table in Markdown, with the simulated pace beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measured", type=Path)
    parser.add_argument("--images", type=float, default=1e9)
    parser.add_argument("--devices", type=int, default=64)
    parser.add_argument("--cores", default="2,4,8,16", help="for each device")
    parser.add_argument("--device-ms", default="2,4,8")
    parser.add_argument("--gigabits", type=float, default=10.0, help="per second of the network, for each device")
    parser.add_argument("--kilobytes", default="84,321", help="read and written for an image: labels only, overlays")
    parser.add_argument("--files", default="0,0", help="opened for an image: labels only, overlays; in tar shards none")
    parser.add_argument("--files-per-second", type=float, default=1000.0, help="that storage opens, for each device")
    parser.add_argument("--price", type=float, default=3.0, help="of a device and its machine for an hour")
    options = parser.parse_args()
    hours_of = f"hours, {options.devices} devices"
    print(f"| overlay | device, ms | cores | images/s, plan | simulated | limit | {hours_of} | cost |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    sizes, opened = (list(map(float, text.split(","))) for text in (options.kilobytes, options.files))
    for overlay, kilobytes, files in zip(("none", "jpg"), sizes, opened, strict=True):
        for device_ms in map(float, options.device_ms.split(",")):
            for cores in map(int, options.cores.split(",")):
                machine = measured(
                    options.measured, overlay, device_ms, cores, kilobytes=kilobytes, gigabits=options.gigabits,
                    files=files, files_per_second=options.files_per_second,
                )  # fmt: skip
                limit, pace = machine.pace()
                hours = options.images / pace / 3600
                print(
                    f"| {overlay} | {device_ms:g} | {cores} | {pace:.0f} | {simulate(machine, 2000):.0f} | {limit} | "
                    f"{hours / options.devices:.0f} | {hours * options.price:,.0f} |"
                )


if __name__ == "__main__":
    main()
