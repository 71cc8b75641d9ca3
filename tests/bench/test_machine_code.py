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


PRODUCTS = """
        /*0000*/                   HGMMA.64x8x16.F32 R0, gdesc[UR4] ;
        /*0010*/              @P1 BRA 0x0 ;
        /*0020*/                   HGMMA.64x128x16.F32 R0, gdesc[UR4] ;
        /*0030*/                   HGMMA.64x40x16.F32 R8, R0, gdesc[UR4] ;
        /*0040*/                   SYNCS.PHASECHK P0, [R4] ;
        /*0050*/              @!P0 BRA 0x40 ;
        /*0060*/                   FSETP.GE P2, R1, 1 ;
        /*0070*/               @P2 BRA 0xb0 ;
        /*0080*/                   FFMA R1, R1, R2, R3 ;
        /*0090*/                   MUFU.EX2 R1, R1 ;
        /*00a0*/                   BRA 0xf0 ;
        /*00b0*/                   FADD R1, R1, R3 ;
        /*00c0*/                   FMUL R1, R1, R2 ;
        /*00d0*/                   FSEL R1, R1, R2, P3 ;
        /*00e0*/                   MUFU.EX2 R1, R1 ;
        /*00f0*/              @!P3 BRA 0x20 ;
        /*0100*/                   EXIT ;
"""


def test_the_shortest_turn_of_a_loop(machine_code: ModuleType) -> None:
    """It waits for nothing, and goes by the fma: what is not on the way does not count."""
    turn = machine_code.shortest_turn(machine_code.parsed(PRODUCTS))
    assert [text.split()[0] for text in turn if text[0] != "@"] == [
        "HGMMA.64x128x16.F32", "HGMMA.64x40x16.F32", "SYNCS.PHASECHK", "FSETP.GE", "FFMA", "MUFU.EX2", "BRA",
    ]  # fmt: skip
    assert len(turn) == 10


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        ({}, []),
        ({"instructions": 4.9}, ["5.00 instructions per number, at most 4.9"]),
        ({"exponentials": 0}, ["1 exponentials, at most 0"]),
        ({"without": "FFMA"}, ["FFMA in the main loop"]),
    ],
)
def test_limits_of_a_turn(machine_code: ModuleType, changes: dict, faults: list[str]) -> None:
    values = {"numbers": 2, "instructions": 5.0, "exponentials": 1, "without": "FSEL"}
    limit = machine_code.TurnLimit(**values | changes)
    assert limit.faults(machine_code.parsed(PRODUCTS)) == faults
    assert limit.faults(machine_code.parsed(LISTING)) == ["no loop with matrix instructions"]
