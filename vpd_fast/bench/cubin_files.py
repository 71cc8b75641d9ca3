"""What a cubin says of itself: parameters and threads of its kernel, as the assembler wrote them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from vpd_fast.errors import InputError

INFO = ".nv.info."  # section of a kernel's attributes, followed by its name
# Attributes and the forms of their values.
KPARAM_INFO, CBANK_PARAM_SIZE, REQNTID = 0x17, 0x19, 0x10
NO_VALUE, BYTE, HALF, SIZED = 1, 2, 3, 4


@dataclass(frozen=True)
class CubinInfo:
    """The only kernel of a cubin. parameters: (offset, size) of each, in bytes. size: of all. threads: of a block."""

    name: str
    parameters: tuple[tuple[int, int], ...]
    size: int
    threads: int


def sections(image: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the sections of a 64-bit little-endian ELF file."""
    if image[:6] != b"\x7fELF\x02\x01":
        raise InputError("no cubin: it does not begin as an ELF file of 64 bits does")
    (table,) = struct.unpack_from("<Q", image, 0x28)
    width, count, of_names = struct.unpack_from("<HHH", image, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", image, table + i * width) for i in range(count)]
    names = headers[of_names][4]
    for name, kind, _, _, offset, size in headers:
        end = image.index(b"\0", names + name)
        empty = kind == 8  # SHT_NOBITS
        yield image[names + name : end].decode(), b"" if empty else image[offset : offset + size]


def attributes(section: bytes) -> Iterator[tuple[int, bytes]]:
    """Attributes and values of a section of `.nv.info`."""
    place = 0
    while place < len(section):
        form, attribute, value = struct.unpack_from("<BBH", section, place)
        place += 4
        if form == SIZED:
            yield attribute, section[place : place + value]
            place += value
        elif form in (NO_VALUE, BYTE, HALF):
            yield attribute, struct.pack("<H", value)
        else:
            raise InputError(f"the cubin has an attribute of form {form}, which is not known")


def read_cubin(image: bytes) -> CubinInfo:
    """What a cubin says of its only kernel. Raises InputError if it has several, or none."""
    found = [(name.removeprefix(INFO), content) for name, content in sections(image) if name.startswith(INFO)]
    if len(found) != 1:
        raise InputError(f"expected a cubin of one kernel, got {len(found)}")
    ((name, content),) = found
    parameters, size, threads = {}, 0, 0
    for attribute, value in attributes(content):
        if attribute == KPARAM_INFO:
            _, ordinal, offset, packed = struct.unpack("<IHHI", value)
            parameters[ordinal] = offset, packed >> 18
        elif attribute == CBANK_PARAM_SIZE:
            (size,) = struct.unpack("<H", value)
        elif attribute == REQNTID:
            x, y, z = struct.unpack("<III", value)
            threads = x * y * z
    return CubinInfo(name, tuple(parameters[i] for i in sorted(parameters)), size, threads)
