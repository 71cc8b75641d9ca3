"""What the layers of a fast model became and why, as a table."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vpd_fast import _native
from vpd_fast.engine.rewrites import REWRITES
from vpd_fast.errors import InputError

if TYPE_CHECKING:
    from vpd_fast.config import VPDConfig
    from vpd_fast.engine.build import LayerInfo


@dataclass(frozen=True)
class EngineReport:
    """Layers of a fast model; `str()` is a table, `rows()` the same as plain values."""

    config: VPDConfig
    precision: str
    layers: tuple[LayerInfo, ...]
    sensitivity: bool = False

    def __post_init__(self) -> None:
        if self.sensitivity and not any(info.snr_db is not None for info in self.layers):
            raise InputError(
                "sensitivity is measured on calibration images: optimize(model, 'int8', calibration=[images])"
            )

    @property
    def bytes(self) -> int:
        """Memory of all layers."""
        return sum(info.bytes for info in self.layers)

    def rows(self) -> list[dict[str, Any]]:
        """One dict per layer, least accurate first if sensitivity was asked for."""
        layers = self.layers
        if self.sensitivity:
            layers = tuple(sorted((i for i in layers if i.snr_db is not None), key=lambda info: info.snr_db or 0.0))
        return [asdict(info) for info in layers]

    def __str__(self) -> str:
        rows = self.rows()
        texts = [
            [
                row["name"],
                "x".join(map(str, row["shape"])),
                row["precision"],
                row["algorithm"],
                f"{row['bytes'] / 2**20:.2f}",
                *([f"{row['snr_db']:.1f}"] if self.sensitivity else []),
                "; ".join(filter(None, (row["reason"], ", ".join(row["rewrites"])))),
            ]
            for row in rows
        ]
        head = ["layer", "weight", "precision", "algorithm", "MiB", *(["SNR dB"] if self.sensitivity else []), "why"]
        widths = [max(len(text[i]) for text in [head, *texts]) for i in range(len(head) - 1)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(text, widths, strict=False)), text[-1]]) for text in [head, *texts]
        ]
        return "\n".join([self._summary(), "", *lines, "", *self._rewrites()])

    def _summary(self) -> str:
        counts = Counter(info.precision for info in self.layers if info.kind != "group_norm")
        parts = ", ".join(f"{n} in {precision}" for precision, n in counts.most_common())
        line = (
            f"{self.config.task} model in {self.precision}: layers with weights: {parts}; {self.bytes / 2**20:.0f} MiB"
        )
        missing = _native.why_missing("_C")
        return line if missing is None else f"{line}\nslow: every layer is computed by PyTorch, because {missing}"

    def _rewrites(self) -> list[str]:
        used = Counter(name for info in self.layers for name in info.rewrites)
        return [f"{name} ({used[name]} layers): {REWRITES[name][0]}; saves {REWRITES[name][1]}" for name in used]
