"""The GPUs that the emulation can be."""

from __future__ import annotations

from typing import NamedTuple


class Device(NamedTuple):
    """Properties of a GPU.

    `order` says in which order threads run and copies arrive (tests/native/cuda_emulation/machine.h): 1 lets a warp
    run ahead as far as it can.
    """

    processors: int = 132
    major: int = 9
    shared_limit: int = 227 << 10
    order: int = 1


H200, A100, L40 = Device(), Device(108, 8, 163 << 10), Device(142, 8, 99 << 10)
