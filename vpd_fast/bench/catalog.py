"""All variants by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vpd_fast.bench import peers
from vpd_fast.bench.parity import GATES
from vpd_fast.bench.variants import Source, Variant, make_fast, make_plain
from vpd_fast.engine import Policy
from vpd_fast.errors import InputError, MissingDependencyError
from vpd_fast.models.attention_backends import BACKENDS, PLAIN, check_backend


@dataclass(frozen=True)
class Entry:
    """A variant that can be made.

    precision: whose gate it must pass, or None for what the others are compared with. why_missing: how to install what
    it needs, or None. size: about how much memory it has at most while it is made, in plain float32 models.
    """

    make: Callable[[Source], Variant]
    precision: str | None
    why_missing: Callable[[], str | None] = lambda: None
    size: float = 2.0


BASELINES = (PLAIN, "sdpa")  # the second where the probabilities of the first do not fit into memory
FAST = ("fp32", "bf16", "int8")
# Forms of a plain model, and what `make_plain` is told for them.
COMPILED = " channels-last compiled"
PLAIN_FORMS: dict[str, dict[str, Any]] = {
    "": {},
    " autocast": {"autocast": True},
    " channels-last": {"channels_last": True},
    COMPILED: {"channels_last": True, "mode": "default"},
    # The quick one first: it compiles again only what surrounds the kernels.
    **{f"{COMPILED} {mode}": {"channels_last": True, "mode": mode} for mode in ("reduce-overhead", "max-autotune")},
}
WITHOUT_GRAPHS = " without graphs"
_DIFFUSERS = partial(peers.why_missing, "diffusers", extra="diffusers")
_OPENVINO = partial(peers.why_missing, "openvino", extra="openvino")
_OPENVINO_INT8 = partial(peers.why_missing, "openvino", "nncf", extra="openvino")
PEERS = {
    "diffusers-fp32": Entry(partial(peers.make_diffusers, dtype=torch.float32), "fp32", _DIFFUSERS),
    "diffusers-bf16": Entry(partial(peers.make_diffusers, dtype=torch.bfloat16), "bf16", _DIFFUSERS),
    "diffusers-compile": Entry(
        partial(peers.make_diffusers, dtype=torch.bfloat16, compiled=True), "bf16", peers.why_no_compile
    ),
    "openvino-fp32": Entry(partial(peers.make_openvino, precision="fp32"), "fp32", _OPENVINO, size=3.0),
    "openvino-bf16": Entry(partial(peers.make_openvino, precision="bf16"), "bf16", _OPENVINO, size=3.0),
    "openvino-int8": Entry(partial(peers.make_openvino, precision="int8"), "int8", _OPENVINO_INT8, size=4.0),
}
ENTRIES = {
    **{
        f"{backend}{form}": Entry(partial(make_plain, attention_backend=backend, **options), "bf16" if form else "fp32")
        for backend in BACKENDS
        for form, options in PLAIN_FORMS.items()
    },
    **{f"fast {p}": Entry(partial(make_fast, precision=p), p, size=3.0 if p == "fp32" else 2.0) for p in GATES},
    **{f"fast {p}{WITHOUT_GRAPHS}": Entry(partial(make_fast, precision=p, graphs=False), p) for p in GATES},
    **PEERS,
}


def choose(precisions: list[str], peer_names: list[str]) -> tuple[list[str], list[str]]:
    """Names of the variants to measure, and why peers that were asked for are left out.

    precisions: of the fast model. peer_names: names of peers, or their first parts ("openvino"), or "all" or "none".
    Raises InputError for unknown ones.
    """
    _check_precisions(precisions, FAST)
    names, missing = [f"fast {p}" for p in FAST if p in precisions], []
    for wanted in peer_names:
        if wanted not in ("all", "none") and not any(_is(name, wanted) for name in PEERS):
            known = ", ".join(PEERS)
            raise InputError(f"--peers must be all, none, diffusers, openvino or some of {known}, got {wanted!r}")
    for name, entry in PEERS.items():
        if any(_is(name, wanted) for wanted in peer_names):
            reason = entry.why_missing()
            if reason is None:
                names.append(name)
            else:
                missing.append(f"{name}: {reason}")
    return names, missing


def choose_in_process(
    device: str, backends: list[str], precisions: list[str] | None, compiled: bool
) -> tuple[list[str], list[str]]:
    """Names of the variants to measure in one process, plain models in all forms and fast ones, and what is left out.

    backends: of the plain model's attention, besides its own. precisions: of fast models; None: all that the device
    has. compiled: with torch.compile, on a GPU. Raises InputError for unknown ones.
    """
    forms = [form for form in PLAIN_FORMS if compiled or not is_compiled(form)]
    if device == "cpu":
        forms = forms[:2]
    names, missing = [PLAIN + form for form in forms[:2]], []
    for backend in backends:
        try:
            check_backend(backend)
        except MissingDependencyError as error:
            missing.append(f"{backend}: {error}")
            continue
        names += [backend + form for form in forms]
    if precisions is None:
        precisions = list(FAST if device == "cpu" else GATES)
    _check_precisions(precisions, GATES)
    for precision in precisions:
        reason = why_unusable(precision, device)
        if reason is not None:
            missing.append(f"fast {precision}: {reason}")
            continue
        names += [f"fast {precision}", *([f"fast {precision}{WITHOUT_GRAPHS}"] if device == "cuda" else [])]
    return names[1:], missing


def why_unusable(precision: str, device: str) -> str | None:
    """Why a fast model of that precision cannot run on the device, or None."""
    try:
        Policy().check_device(precision, torch.device(device))
    except InputError as error:
        return str(error)
    return None


def is_compiled(name: str) -> bool:
    """Whether a variant is compiled by torch.compile, which takes minutes."""
    return COMPILED in name


def may_be_replayed(name: str) -> bool:
    """Whether a variant may be captured in a CUDA graph: not if it has graphs of its own, or is to have none."""
    return not is_compiled(name) and not name.endswith(WITHOUT_GRAPHS)


def in_order(device: str, names: list[str]) -> list[tuple[str, list[str]]]:
    """How variants in one process are timed, and which: "calls", on a GPU also "replays" of CUDA graphs.

    What has to be compiled for minutes comes last, when everything else has been measured.
    """
    if device != "cuda":
        return [("calls", names)]
    compiled = [name for name in names if is_compiled(name)]
    others = [name for name in names if name not in compiled]
    parts = [("calls", others), ("replays", [name for name in others if may_be_replayed(name)])]
    return parts + ([("calls", compiled)] if compiled else [])


def _check_precisions(precisions: list[str], known: Iterable[str]) -> None:
    for precision in precisions:
        if precision not in known:
            raise InputError(f"--precision must be some of {', '.join(known)}, got {precision!r}")


def _is(name: str, wanted: str) -> bool:
    return wanted in ("all", name, name.partition("-")[0])
