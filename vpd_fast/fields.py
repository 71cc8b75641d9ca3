"""Dataclasses out of plain values, as YAML and JSON give them, strict about what they do not know.

The type of a field is its annotation, the range of its numbers is beside it: `width: int = between(1, 64, default=32)`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from vpd_fast.errors import InputError, brief

_RANGE = "range"


def between(low: float, high: float, **options: Any) -> Any:
    """Return a dataclass field whose numbers, also those in a tuple, are from `low` to `high`; options of `field`."""
    return dataclasses.field(metadata={_RANGE: (low, high)}, **options)


def check_fields(instance: Any) -> None:
    """Convert the fields of a dataclass to their types, in place, and check their ranges. Raises InputError."""
    cls = type(instance)
    for field in dataclasses.fields(cls):
        where = f"{cls.__name__}.{field.name}"
        value = _convert(getattr(instance, field.name), _hints(cls)[field.name], where, strict=True)
        low, high = field.metadata.get(_RANGE, (-math.inf, math.inf))
        for number in value if isinstance(value, tuple) else (value,):
            is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
            if is_number and not low <= number <= high:
                raise InputError(f"{where} must be from {low:g} to {high:g}, got {brief(value)}")
        object.__setattr__(instance, field.name, value)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def build(cls: type, values: Any, where: str = "", strict: bool = False) -> Any:
    """Make the dataclass `cls` of a mapping of its fields, sections inside likewise; if strict, no number is a text.

    Raises InputError.
    """
    if dataclasses.is_dataclass(values):
        return values
    if not isinstance(values, Mapping):
        raise InputError(f"{where or 'the configuration'} must be a section of settings, got {brief(values)}")
    check_keys(values, field_names(cls), where)
    hints = _hints(cls)
    return cls(**{key: _convert(value, hints[key], _join(where, key), strict) for key, value in values.items()})


def _convert(value: Any, hint: Any, where: str, strict: bool = False) -> Any:
    """Convert `value` to `hint`, or raise InputError. Numbers are finite.

    YAML 1.1 reads 8e-5 as a string, so numbers may be strings, unless strict.
    """
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, value, where, strict)
    if isinstance(hint, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        for option in options:
            try:
                return _convert(value, option, where, strict)
            except InputError:
                continue
    elif typing.get_origin(hint) is dict:
        if isinstance(value, Mapping):
            return dict(value)
    elif typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        if isinstance(value, (list, tuple)) and (items[-1] is ... or len(items) == len(value)):
            return tuple(_convert(item, items[0], where, strict) for item in value)
    elif hint is float and isinstance(value, (int, float) if strict else (int, float, str)):
        if isinstance(value, bool):
            raise InputError(f"{where} must be {_say(hint)}, got {brief(value)}")
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif hint is str and isinstance(value, str):
        return str(value)
    elif hint in (int, bool) and type(value) is hint:
        return value
    raise InputError(f"{where} must be {_say(hint)}, got {brief(value)}")


def _say(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(_say(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return "a list of texts" if str in typing.get_args(hint) else "a list of numbers"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return names.get(hint, "a section of settings")


def check_keys(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raise InputError for a key that is not a setting, naming the closest ones."""
    for key in values:
        if key not in known:
            raise InputError(
                f"{_join(where, str(key))} is not a setting{close_names(str(key), known)}; "
                f"{where or 'the configuration'} has {', '.join(known)}"
            )


def close_names(name: str, known: Sequence[str]) -> str:
    """Return ", did you mean ...?" for a message, or nothing where no name is close."""
    near = difflib.get_close_matches(name, known, n=3)
    return f", did you mean {' or '.join(near)}?" if near else ""


def field_names(cls: type) -> list[str]:
    """Return the names of a dataclass's fields."""
    return [f.name for f in dataclasses.fields(cls)]


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
