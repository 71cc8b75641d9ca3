"""Checks of arguments that all operators share. They are plain comparisons, so torch.compile traces through them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vpd_fast.errors import InputError, brief

MAX_SIDE = 1 << 24  # of an image: far beyond what fits into memory, far below what overflows
MAX_FLOAT32 = torch.finfo(torch.float32).max
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check(condition: bool, message: str) -> None:
    """Raises InputError(message) unless the condition holds."""
    if not condition:
        raise InputError(message)


def check_value(condition: bool, requirement: str, value: Any) -> None:
    """Raises InputError unless the condition on the value holds.

    What the value is like is written down only then: torch.compile of PyTorch 2.11 cannot follow that.
    """
    if not condition:
        raise InputError(f"{requirement}, got {brief(value)}")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises InputError unless the value is one of the choices, which are strings, dtypes or None."""
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise InputError(f"{name} must be {_listed(choices)}, got {brief(value)}")


def kind_of(value: Any) -> str:
    """What a message says of a value that is no dense tensor."""
    if not isinstance(value, torch.Tensor):
        return brief(value)
    kinds = {"nested": value.is_nested, "negative view": value.is_neg(), "zero": value._is_zerotensor()}
    return f"a tensor of layout {value.layout}{''.join(f' ({kind})' for kind, found in kinds.items() if found)}"


def _listed(choices: Sequence[Any]) -> str:
    *others, last = (repr(choice).removeprefix("torch.") for choice in choices)
    return f"{', '.join(others)} or {last}"


def is_int(value: Any) -> bool:
    """Whether the value is an integer, also one that torch.compile leaves open, and no bool."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def is_dense(value: Any) -> bool:
    """Whether the value is a tensor whose elements lie in memory as they are, at regular distances."""
    dense = isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_nested
    # The compiler knows no views of these kinds.
    return dense and (torch.compiler.is_compiling() or not (value.is_neg() or value._is_zerotensor()))


def check_impl(impl: Any) -> str:
    """The name of an implementation, whatever it names. Raises InputError for what is no name."""
    if not isinstance(impl, str) or not impl.isascii():  # PyTorch takes no other text
        raise InputError(f"impl must be a string, got {brief(impl)}")
    return impl


def check_tensor(
    name: str,
    value: Any,
    shape: str,
    dtypes: Sequence[torch.dtype] = FLOATS,
    may_be_empty: str = "",
    **sizes: int,
) -> None:
    """Raises InputError unless `value` is a tensor of the given shape and one of the dtypes.

    name: of the argument. shape: one word per dimension, as in "B C h w". sizes: what some of these words must be.
    may_be_empty: the words whose size may be 0.

        >>> check_tensor("k", k, "B L D", D=q.shape[-1], may_be_empty="B")
    """
    words = shape.split()
    if is_dense(value) and value.dtype in dtypes and len(value.shape) == len(words):
        empty = may_be_empty.split()
        pairs = zip(words, value.shape, strict=True)
        if all(size == sizes.get(word, size) and (size != 0 or word in empty) for word, size in pairs):
            return
    _explain_tensor(name, value, words, dtypes, may_be_empty.split(), sizes)


def _explain_tensor(
    name: str, value: Any, words: list[str], dtypes: Sequence[torch.dtype], may_be_empty: list[str], sizes: dict
) -> None:
    """Raises the error of a tensor that did not pass `check_tensor`."""
    expected = ", ".join(f"{word}={sizes[word]}" if word in sizes else word for word in words)
    if not isinstance(value, torch.Tensor):
        raise InputError(f"{name} must be a tensor of shape ({expected}), got {type(value).__name__}")
    if not is_dense(value):
        raise InputError(f"{name} must be a dense tensor, got {kind_of(value)}")
    shape = tuple(value.shape)
    if len(shape) != len(words) or any(size != sizes.get(word, size) for word, size in zip(words, shape, strict=True)):
        raise InputError(f"{name} must have shape ({expected}), got {shape}")
    for word, size in zip(words, shape, strict=True):
        if size == 0 and word not in may_be_empty:
            raise InputError(f"{name} has no elements along {word}: expected ({expected}), got {shape}")
    raise InputError(f"{name} must be {' or '.join(str(d) for d in dtypes)}, got {value.dtype}")


def check_not_expanded(name: str, tensor: torch.Tensor) -> None:
    """Raises InputError if elements of a tensor that is to be written share memory."""
    if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        where = f"(shape {tuple(tensor.shape)}, strides {tensor.stride()})"
        raise InputError(f"{name} must not be expanded: its elements share memory {where}")


def check_no_gradients(op: str, tensors: dict[str, torch.Tensor | None]) -> None:
    """Raises InputError for a tensor that requires gradients while they are recorded."""
    for name, tensor in tensors.items():
        check(
            tensor is None or not (torch.is_grad_enabled() and tensor.requires_grad),
            f"{name} requires gradients, which {op} does not compute: call it under torch.no_grad()",
        )


def check_places(op: str, device: torch.device, tensors: dict[str, torch.Tensor | None]) -> None:
    """Raises InputError for a tensor on another device than `x`, and for one that requires gradients."""
    for name, tensor in tensors.items():
        if tensor is not None:
            check(tensor.device == device, f"{name} must be on {device} as x is, got {tensor.device}")
    check_no_gradients(op, tensors)


def check_flag(name: str, value: Any) -> None:
    """Raises InputError unless the value is a bool."""
    if not isinstance(value, bool):
        raise InputError(f"{name} must be True or False, got {brief(value)}")


def check_eps(eps: Any) -> float:
    """`eps` as float. Raises InputError unless it is a finite number that is not negative."""
    good = isinstance(eps, (int, float)) and 0 <= eps <= MAX_FLOAT32
    if not good:
        raise InputError(f"eps must be a finite number that is not negative, got {brief(eps)}")
    return float(eps)


def check_size(name: str, value: Any) -> tuple[int, int]:
    """(height, width) as a tuple. Raises InputError unless both are positive integers of at most MAX_SIDE."""
    if not isinstance(value, Sequence) or len(value) != 2:
        raise InputError(f"{name} must be (height, width), got {brief(value)}")
    for number in value:
        if not is_int(number) or number < 1:
            raise InputError(f"{name} must be two positive integers (height, width), got {brief(value)}")
        if number > MAX_SIDE:
            raise InputError(f"{name} must be at most {MAX_SIDE} pixels high and wide, got {brief(value)}")
    return value[0], value[1]
