"""What is read off machine code, on a listing whose loops are known."""

from __future__ import annotations

from types import ModuleType

import pytest

LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                   /* 0x00000a00ff017624 */
        /*0010*/                   LDG.E R9, [R2.64] ;                      /* 0x0000000402097981 */
        /*0020*/                   IADD3 R9, R9, 0x1, RZ ;
        /*0030*/              @P1 BRA 0x10 ;
        /*0040*/                   LDG.E.128 R4, [R2.64] ;
        /*0050*/                   LDG.E.128 R8, [R2.64+0x10] ;
        /*0060*/               @P0 LDG.E.128 R12, [R2.64+0x20] ;
        /*0070*/                   IADD3 R2, R2, 0x30, RZ ;
        /*0080*/                   FADD R20, R15, R6 ;
        /*0090*/                   LDG.E.128 R16, [R2.64+0x10] ;
        /*00a0*/                   STG.E [R24.64], R20 ;
        /*00b0*/              @!P0 BRA `(.L_x_1) 0x40 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   BRA 0xd0 ;
"""


@pytest.fixture
def machine_code(script) -> ModuleType:
    return script("machine_code")


def test_loop_and_its_loads(machine_code: ModuleType) -> None:
    loop = machine_code.main_loop(machine_code.parsed(LISTING))
    assert [address for address, _ in loop] == [*range(0x40, 0xC0, 0x10)]
    assert machine_code.loads_before_use(loop) == 3


@pytest.mark.parametrize(
    ("limit", "faults"),
    [
        ((8, 1.0, 3), []),
        ((8, 0.99, 3), ["1.00 instructions per number, at most 0.99"]),
        ((4, 1.0, 4), ["2.00 instructions per number, at most 1.0", "3 loads on their way, at least 4"]),
    ],
)
def test_limits(machine_code: ModuleType, limit: tuple, faults: list[str]) -> None:
    code = machine_code.parsed(LISTING)
    assert machine_code.LoopLimit(*limit).faults(code) == faults
    assert machine_code.LoopLimit(*limit).faults(code[-2:-1]) == ["no loop with loads"]
