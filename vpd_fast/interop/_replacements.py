"""Methods of somebody else's modules replaced in an instance, and what was there before."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from torch import nn

from vpd_fast.errors import InputError

RECORD = "_vpd_fast_replacements"


class Replacement(Protocol):
    """What stands for a method of a module: `getattr(self, self.method)` in its place."""

    name: str
    module: nn.Module
    method: ClassVar[str]

    def try_out(self) -> None:
        """Raises InputError if it computes something else than the method it stands for."""
        ...


class Replacements:
    """Replacements in one model: all of them are in place, or none."""

    def __init__(self) -> None:
        self.added: list[Replacement] = []
        self._before: list[Any] = []  # what the instance had itself; None: what its class has

    def add(self, replacement: Replacement) -> None:
        """Take one more in, which `apply` puts into place."""
        self.added.append(replacement)

    def apply(self) -> None:
        """Put all into place."""
        for replacement in self.added:
            own = vars(replacement.module)
            self._before.append(own.get(replacement.method))
            own[replacement.method] = getattr(replacement, replacement.method)

    def undo(self) -> None:
        """Put back what was there. Raises InputError, and changes nothing, if one has been replaced since."""
        for replacement in self.added:
            method = replacement.method
            if vars(replacement.module).get(method) != getattr(replacement, method):
                raise InputError(
                    f"{replacement.name}.{method} was replaced after vpd_fast.accelerate: undo that before restoring"
                )
        for replacement, before in zip(self.added, self._before, strict=True):
            own = vars(replacement.module)
            if before is None:
                del own[replacement.method]
            else:
                own[replacement.method] = before
