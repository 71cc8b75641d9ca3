"""What loops of a kernel's machine code (SASS) are made of."""

from __future__ import annotations

import re
from dataclasses import dataclass

Instruction = tuple[int, str]  # address and text

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]*?)\s*;")
JUMP = re.compile(r"\bBRA\b.*?(0x[0-9a-f]+)")
LOAD = re.compile(r"^(?:@!?U?P\w+ +)?LDG\.(\S+) +R(\d+),")
WORDS = {"64": 2, "128": 4}  # registers that a load fills


@dataclass(frozen=True)
class LoopLimit:
    """What the loop with the most loads must keep to.

    numbers: that one pass of it handles. instructions: at most, per number. loads: at least so many are on their way
    before the first one is used.
    """

    numbers: int
    instructions: float
    loads: int

    def faults(self, code: list[Instruction]) -> list[str]:
        """What the loop does not keep to, in words; a kernel without loads in a loop has that fault."""
        loop = main_loop(code)
        if not loop:
            return ["no loop with loads"]
        found, per_number = loads_before_use(loop), len(loop) / self.numbers
        faults = []
        if per_number > self.instructions:
            faults.append(f"{per_number:.2f} instructions per number, at most {self.instructions}")
        if found < self.loads:
            faults.append(f"{found} loads on their way, at least {self.loads}")
        return faults


def parsed(text: str) -> list[Instruction]:
    """The instructions of a function, as `cuobjdump -sass` prints it."""
    return [(int(address, 16), code) for address, code in LINE.findall(text)]


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """The loop with the most loads of 8 or 16 bytes among those that contain no other loop; of several the shortest."""
    places = {address: i for i, (address, _) in enumerate(code)}
    spans = []
    for i, (address, text) in enumerate(code):
        jump = JUMP.search(text)
        if jump and int(jump[1], 16) < address and int(jump[1], 16) in places:
            spans.append((places[int(jump[1], 16)], i + 1))
    inner = [(a, b) for a, b in spans if not any((a, b) != (c, d) and a <= c and d <= b for c, d in spans)]
    loops = [code[a:b] for a, b in inner]
    return max(loops, key=lambda loop: (sum(is_wide(text) for _, text in loop), -len(loop)), default=[])


def is_wide(text: str) -> bool:
    """Whether an instruction loads 8 or 16 bytes from global memory."""
    load = LOAD.match(text)
    return load is not None and load[1].endswith(tuple(WORDS))


def loads_before_use(loop: list[Instruction]) -> int:
    """How many loads from global memory a loop starts before it reads a register that one of them fills."""
    filled: set[int] = set()
    count = 0
    for _, text in loop:
        load = LOAD.match(text)
        operands = text.partition(",")[2] if load else text
        if filled & {int(n) for n in re.findall(r"\bR(\d+)\b", operands)}:
            return count
        if load:
            words = next((words for width, words in WORDS.items() if load[1].endswith(width)), 1)
            filled |= set(range(int(load[2]), int(load[2]) + words))
            count += 1
    return count


@dataclass(frozen=True)
class TurnLimit:
    """What one turn of the loop with the most matrix instructions must keep to, where it takes every short cut.

    numbers: that a thread handles. instructions: at most, per number. exponentials: MUFU.EX2, at most. without: what
    must not be there.
    """

    numbers: int
    instructions: float
    exponentials: int
    without: str

    def faults(self, code: list[Instruction]) -> list[str]:
        """What the loop does not keep to, in words; a kernel without matrix instructions in a loop has that fault."""
        turn = shortest_turn(code)
        if not turn:
            return ["no loop with matrix instructions"]
        per_number, words = len(turn) / self.numbers, " ".join(turn)
        exponentials = words.count("MUFU.EX2")
        faults = []
        if per_number > self.instructions:
            faults.append(f"{per_number:.2f} instructions per number, at most {self.instructions}")
        if exponentials > self.exponentials:
            faults.append(f"{exponentials} exponentials, at most {self.exponentials}")
        if re.search(self.without, words):
            faults.append(f"{self.without} in the main loop")
        return faults


def shortest_turn(code: list[Instruction]) -> list[str]:
    """The fewest instructions of a turn of the shortest loop among those with the most matrix instructions."""
    places = {address: i for i, (address, _) in enumerate(code)}
    turns = []
    for last, (address, text) in enumerate(code):
        jump = JUMP.search(text)
        if jump and int(jump[1], 16) < address and int(jump[1], 16) in places:
            turn = _turn(code, places, places[int(jump[1], 16)], last)
            if products := sum("GMMA" in text for text in turn):
                turns.append((products, -len(turn), turn))
    most = max((products for products, *_ in turns), default=0)
    return max((turn for turn in turns if turn[0] == most), default=(0, 0, []))[2]


def _turn(code: list[Instruction], places: dict[int, int], first: int, last: int) -> list[str]:
    """The shortest way from the first to the last instruction of a loop; jumps back within it are not taken.

    An exponential, which takes longer than others, counts twice.
    """
    best: dict[int, tuple[int, int]] = {first: (1, -1)}  # length of the way to each, and what comes before it
    for place in range(first, last):
        if place not in best:
            continue
        text, following = code[place][1], [place + 1]
        if jump := JUMP.search(text):
            target = places.get(int(jump[1], 16), -1)
            conditional = text.startswith("@") or re.search(r"BRA\S* +!?U?P", text)
            following = [target, *(following if conditional else [])]
        elif re.match(r"EXIT|RET", text):
            following = []
        for other in following:
            length = best[place][0] + (2 if "MUFU.EX2" in text else 1)
            if place < other <= last and (other not in best or length < best[other][0]):
                best[other] = (length, place)
    way, place = [], last if last in best else -1
    while place >= 0:
        way.append(code[place][1])
        place = best[place][1]
    return way[::-1]
