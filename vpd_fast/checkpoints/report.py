"""What happened to the tensors of a checkpoint, for people to read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

_SHOWN, _MAX_SHOWN = 5, 80

# Weights that VPD does not have, by name, and why leaving them out is right. First match wins.
_UNUSED = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (r"(encoder\.)?sd_model\.", "diffusion schedule"),
        (r"(encoder\.)?unet\.unet\.diffusion_model\.out\.|model\.diffusion_model\.out\.", "noise output of the UNet"),
        (r"(encoder\.)?(encoder_vq|first_stage_model)\.decoder\.", "image decoder"),
        (r"(encoder\.)?(encoder_vq|first_stage_model)\.loss\.", "autoencoder training loss"),
        (r"model_ema\.", "moving averages of the UNet"),
        (r"(\w+\.)?(model_ema|ema_model|ema)\.", "moving averages"),
        (r"(\w+\.)?n_averaged$", "number of averaged steps"),
        (r"cond_stage_model\.|(encoder\.)?clip_model\.", "text encoder"),
        (r"auxiliary_head\.", "auxiliary head, for training only"),
        (
            r"(posterior|sqrt|log)_\w+$|(betas|alphas_cumprod|alphas_cumprod_prev|logvar|scale_factor)$",
            "diffusion schedule",
        ),
    )
)


def unused_reason(key: str) -> str | None:
    """Return why a VPD model has no place for the tensor `key`, if that is expected."""
    return next((reason for pattern, reason in _UNUSED if pattern.match(key)), None)


@dataclass
class LoadReport:
    """Tells what became of every tensor in a checkpoint, and of every weight of the model.

    loaded: copied into the model. missing: in the model, not in the file. fresh: missing on purpose, newly initialised.
    unexpected: in the file, unknown to the model. ignored: {reason: names} of the file's tensors that VPD never uses.
    contents: other things in the file (optimizer, epoch, ...), not read. placeholders: classes of pickled objects that
    were not rebuilt. dtypes: {dtype in the file: how many loaded tensors}. notes: sentences.
    """

    source: Path
    format: str
    task: str
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    ignored: dict[str, list[str]] = field(default_factory=dict)
    contents: tuple[str, ...] = ()
    placeholders: tuple[str, ...] = ()
    dtypes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def sort_leftovers(self, keys: Iterable[str]) -> None:
        """File the tensors that the model did not take as ignored or unexpected."""
        for key in keys:
            reason = unused_reason(key)
            if reason is None:
                self.unexpected.append(key)
            else:
                self.ignored.setdefault(reason, []).append(key)

    def __str__(self) -> str:
        dtypes = ", ".join(f"{count} {name}" for name, count in self.dtypes.items())
        lines = [f"{self.source} ({self.format} format, {self.task})"]
        lines.append(f"  loaded      {len(self.loaded)} tensors" + (f" ({dtypes})" if dtypes else ""))
        for title, names in (("missing", self.missing), ("fresh", self.fresh), ("unexpected", self.unexpected)):
            if names:
                lines.append(f"  {title:<11} {first_names(names)}")
        lines += [f"  ignored     {reason}: {first_names(names)}" for reason, names in self.ignored.items()]
        if self.contents:
            lines.append(f"  not read    {first_names(self.contents)}")
        if self.placeholders:
            lines.append(f"  not rebuilt {first_names(self.placeholders)}")
        lines += [f"  note        {note}" for note in self.notes]
        return "\n".join(lines)


def first_names(names: Iterable[str]) -> str:
    """Return '3: a, b, c', shortened after the first few."""
    names = [name if len(name) <= _MAX_SHOWN else f"{name[:_MAX_SHOWN]}..." for name in names]
    more = f", ... and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)}: {', '.join(names[:_SHOWN])}{more}"


@dataclass
class ConvertReport:
    """Tells what `convert` wrote. dropped: {reason: names} of tensors of the source that the target has no place for.

    lacking: what the target format usually has and this file does not.
    """

    source: Path
    destination: Path
    source_format: str
    target_format: str
    written: list[str] = field(default_factory=list)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    lacking: list[str] = field(default_factory=list)
    placeholders: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.source} ({self.source_format}) -> {self.destination} ({self.target_format})"]
        lines.append(f"  written     {len(self.written)} tensors")
        lines += [f"  left out    {reason}: {first_names(names)}" for reason, names in self.dropped.items()]
        lines += [f"  lacking     {what}" for what in self.lacking]
        if self.placeholders:
            lines.append(f"  not rebuilt {first_names(self.placeholders)}")
        return "\n".join(lines)
