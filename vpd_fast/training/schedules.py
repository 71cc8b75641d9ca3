"""Learning-rate schedules: factors on the optimiser's learning rates, by the number of steps done."""

from __future__ import annotations

from collections.abc import Callable

from vpd_fast.errors import InputError

Schedule = Callable[[int], float]


def constant(steps: int) -> Schedule:
    """Return 1 at every step."""
    return lambda step: 1.0


def poly(steps: int, *, power: float = 0.9) -> Schedule:
    """Return (1 - step / steps) ** power: referring segmentation's schedule."""
    return lambda step: (1 - min(step, steps) / steps) ** power


def poly_warmup(steps: int, *, power: float = 1.0, warmup_steps: int = 1500, warmup_ratio: float = 1e-6) -> Schedule:
    """Return `poly`, during the first warmup_steps times a line from warmup_ratio to 1: segmentation's (mmcv 1.x)."""
    regular = poly(steps, power=power)

    def factor(step: int) -> float:
        if step >= warmup_steps:
            return regular(step)
        return regular(step) * (1 - (1 - step / warmup_steps) * (1 - warmup_ratio))

    return factor


def up_down(
    steps: int, *, min_lr: float = 3e-5, max_lr: float = 5e-4, power: float = 0.9, rise: float = 12 / 25
) -> Schedule:
    """Go from min_lr up to max_lr and down again, relative to max_lr: depth's schedule.

    rise: the share of the steps that go up; the original's 25 epochs have 12 of them, half rounded down. Its steps
    count from 1, so the first is above min_lr already.
    """
    low, half = min_lr / max_lr, max(round(steps * rise), 1)

    def factor(step: int) -> float:
        done = (step + 1) / half
        if done < 1:
            return (1 - low) * done**power + low
        return max(low, (low - 1) * (done - 1) ** power + 1)

    return factor


SCHEDULES = {"constant": constant, "poly": poly, "poly_warmup": poly_warmup, "up_down": up_down}


def make_schedule(name: str, *, steps: int, **options: float) -> Schedule:
    """Make the factor on every group's learning rate for the step that follows `step` finished ones, 0 <= step < steps.

    Raises InputError for an unknown name, TypeError for options that the schedule does not have.
    """
    if name not in SCHEDULES:
        raise InputError(f"schedule must be one of {', '.join(SCHEDULES)}, got {name!r}")
    if steps < 1:
        raise InputError(f"a schedule needs at least one step, got {steps}")
    return SCHEDULES[name](steps, **options)
