"""What Triton compiles a kernel anew for, as text, and how the arguments of such a kernel lie in memory.

A key looks like `_gemm._gemm_kernel(*bf16:16, i32:16, i32, fp32, =None, =128) num_stages=3 num_warps=8`. Of each
parameter it has the type, of pointers with what they point to, and ":16" where address or integer is a multiple of 16,
or "=" and the value that is compiled in: of a `tl.constexpr`, of None, and of an integer that is 1.
"""

import functools
import struct
from collections.abc import Mapping
from typing import Any

import torch

POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
    torch.float8_e4m3fn: "*fp8e4nv",
}
FORMATS = {"i32": "i", "i64": "q", "fp32": "f", "u1": "?"}  # those of `struct`; pointers are "P"
ALIGNED = ":16"
CONSTANT = "="


def name_of(kernel: Any) -> str:
    """The module within `vpd_fast.kernels` and the function: two modules may have kernels of one name."""
    return f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"


def specialize(kernel: Any, arguments: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """The key of a launch, and the values of the parameters that are not compiled in, addresses for tensors.

    kernel: of `triton.jit`. arguments: of the kernel by name, and the options of the launch, such as num_warps.
    """
    tokens, values, names = [], [], set()
    for parameter in kernel.params:
        names.add(parameter.name)
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            tokens.append(f"{CONSTANT}{value!r}")
        elif isinstance(value, torch.Tensor):
            address = value.data_ptr()
            tokens.append(POINTERS[value.dtype] + ALIGNED * (address % 16 == 0))
            values.append(address)
        elif isinstance(value, bool | float):
            tokens.append("u1" if isinstance(value, bool) else "fp32")
            values.append(value)
        elif value == 1 and not parameter.do_not_specialize:
            tokens.append(f"{CONSTANT}1")
        else:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            plain = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
            tokens.append(kind + ALIGNED * (not plain and value % 16 == 0))
            values.append(value)
    options = (f" {name}={arguments[name]!r}" for name in sorted(arguments) if name not in names)
    return f"{name_of(kernel)}({', '.join(tokens)}){''.join(options)}", values


def parse(key: str) -> tuple[str, list[str], dict[str, str]]:
    """The kernel, the token of each parameter and the options of a key, values as Python writes them."""
    kernel, _, rest = key.partition("(")
    tokens, _, options = rest.rpartition(")")
    return kernel, tokens.split(", "), dict(option.split("=", 1) for option in options.split())


@functools.cache
def layout(key: str, scratch: int) -> tuple[struct.Struct, list[int]]:
    """How the values of `specialize` are packed, with pointers to no scratch memory behind them, and where each begins.

    Every value lies at a multiple of its size, as in a C structure. scratch: how many such pointers the compiler added.
    """
    kinds = (token.removesuffix(ALIGNED) for token in parse(key)[1] if not token.startswith(CONSTANT))
    formats = [FORMATS.get(kind, "P") for kind in kinds] + ["P"] * scratch
    ends = [struct.calcsize("@" + "".join(formats[: i + 1])) for i in range(len(formats))]
    return struct.Struct("@" + "".join(formats)), [
        end - struct.calcsize(form) for end, form in zip(ends, formats, strict=True)
    ]
