"""A stage of pre-training: a loop that can be stopped at any time and goes on where it was."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vpd_fast.errors import CheckpointError
from vpd_fast.files import write_files
from vpd_fast.training.stopping import StopSignals

SAVE_EVERY = 120.0  # seconds


class Average:
    """Running mean of weights, with a horizon of at most 1000 steps."""

    def __init__(self, module: nn.Module) -> None:
        self.tensors = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take the weights in after step `step`, from 1 on."""
        share = max(0.001, 1 / (1 + step / 10))
        names, parameters = zip(*module.named_parameters(), strict=True)
        torch._foreach_lerp_([self.tensors[name] for name in names], list(parameters), share)


def train(
    name: str,
    module: nn.Module,
    loss_of: Callable[[int], Tensor],
    folder: Path,
    *,
    steps: int,
    lr: float,
    identity: Mapping[str, Any],
    weight_decay: float = 0.01,
    each: Callable[[], object] | None = None,
) -> float:
    """Train `module` for `steps` steps of AdamW, of which `folder`/state may have some; it ends with averaged weights.

    loss_of(step) must depend on nothing but the step and the weights, so that a resumed run sees the same batches.
    identity: plain values that say what is trained; a state with others is refused. each() is called whenever the state
    is saved. Returns the mean loss of the last tenth. Asked to stop (Ctrl-C, SIGTERM) it finishes the step, saves and
    raises KeyboardInterrupt. Raises CheckpointError for a state that cannot be read or belongs to other settings.
    """
    path = folder / "state" / f"{name}.pt"
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    average, done, losses = Average(module), 0, []
    identity = {"steps": steps, "lr": lr, "weight_decay": weight_decay, **identity}
    if path.is_file():
        state = _read(path, identity)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        average.tensors, done, losses = state["average"], state["step"], state["losses"]

    def save() -> None:
        values: dict[str, Any] = {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
        values |= {"average": average.tensors, "step": done, "losses": losses, "identity": identity}
        write_files({path: lambda temporary: torch.save(values, temporary)})

    saved = time.monotonic()
    with StopSignals() as signals, tqdm(total=steps, initial=done, desc=name, unit="step", smoothing=0.02) as bar:
        while done < steps:
            for group in optimizer.param_groups:
                group["lr"] = lr * _rate(done, steps)
            loss = loss_of(done)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done += 1
            average.update(module, done)
            losses.append(loss.item())
            bar.update()
            if done % 20 == 0:
                bar.set_postfix(loss=f"{sum(losses[-100:]) / len(losses[-100:]):.4f}")
            if signals.asked or time.monotonic() - saved > SAVE_EVERY or done == steps:
                save()
                saved = time.monotonic()
                if signals.asked and done < steps:
                    raise KeyboardInterrupt
                if each is not None and done < steps:
                    each()
    module.load_state_dict(average.tensors, strict=False)
    return sum(losses[-max(steps // 10, 1) :]) / max(steps // 10, 1)


def _rate(step: int, steps: int) -> float:
    """Warm-up over the first 2 %, then a cosine down to nearly nothing."""
    warmup = max(steps // 50, 1)
    return min((step + 1) / warmup, 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))


def _read(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    try:
        state = torch.load(path, weights_only=True)
        found = state["identity"]
    except Exception as error:  # torch raises what the pickle, zip and file systems do
        raise CheckpointError(f"{path}: not a readable state of training ({error}); remove it to begin anew") from error
    if found != identity:
        raise CheckpointError(
            f"{path}: was made with {json.dumps(found)}, not {json.dumps(identity)}; give the same or another folder"
        )
    return state
