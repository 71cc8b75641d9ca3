"""A process that dies names the step at which it did."""

from __future__ import annotations

import pytest

from .alone import run_alone

DIES = "print('step 2'); import ctypes; ctypes.string_at(0)"


def test_a_death_names_itself() -> None:
    with pytest.raises(
        AssertionError, match=r"died of SIGSEGV:\n(.*\n)*step 2\n(.*\n)*Fatal Python error: Seg"
    ) as error:
        run_alone("-c", DIES)
    assert "and again, kernel by kernel, died of SIGSEGV" in str(error.value)


def test_other_ends() -> None:
    run_alone("-c", "print('all is well')")
    with pytest.raises(AssertionError, match=r"ended with 1:\n(.*\n)*ValueError: no"):
        run_alone("-c", "raise ValueError('no')")
