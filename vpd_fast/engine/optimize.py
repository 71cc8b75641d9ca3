"""`optimize`: from a plain model to a fast one; `FastEncoder`: to a fast KL encoder alone, for training behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

import torch
from torch import Tensor

from vpd_fast.engine.base import Engine
from vpd_fast.engine.build import LayerInfo, build_layer
from vpd_fast.engine.calibrate import Batch, Calibration, check_batches
from vpd_fast.engine.layers import Layers
from vpd_fast.engine.model import FastVPD
from vpd_fast.engine.policy import ACTIVATIONS, PRECISIONS, Policy
from vpd_fast.engine.specs import Spec, layer_specs
from vpd_fast.errors import InputError, brief
from vpd_fast.models.vpd import VPD
from vpd_fast.progress import ProgressBar


def optimize(
    model: VPD,
    precision: str = "fp32",
    calibration: Sequence[Tensor | Batch] | Tensor | None = None,
    policy: Policy | None = None,
    *,
    device: torch.device | str | None = None,
    graphs: bool = True,
    progress: bool = False,
) -> FastVPD:
    """The fast form of a model: the same calls and results, inference only.

    model: a plain model in evaluation mode, float32, on the CPU or a GPU. It is not changed, and may be deleted
        afterwards: layers are converted one by one and share nothing with it.
    precision: "fp32", "bf16" (bfloat16 weights and activations) or "int8" (8-bit weights and inputs of nearly all
        convolutions and linear layers, bfloat16 between them; inputs are rounded with a scale of their own for each
        position, so no calibration is needed); on GPUs also "fp16" (as "bf16") and "fp8" (as "int8", with float8_e4m3fn
        for 8 bits; less accurate, because three bits behind the point are fewer than eight without one).
    calibration: for "int8" and "fp8", images (B,3,H,W) as the model takes them, or a list of such; evens out the ranges
        of input channels (Xiao et al., SmoothQuant, ICML 2023) and measures each layer's error for
        `report(sensitivity=True)`. A referring model's list may have tuples (images, tokens); without tokens, random
        ones are taken.
    policy: choices of one's own; see `Policy`.
    device: of the fast model, "cpu" or a GPU; None: where the model is. The model itself need not fit onto it.
    graphs: run encoder, UNet and head as graphs; `FastVPD.graphs` can be changed later.
    progress: show a progress bar.

    Raises InputError for another model or precision, one in training mode, on another device or not in float32, and for
    calibration images of a wrong shape, not finite or constant.
    """
    _check_model(model, precision)
    if any(module.training for module in model.modules()):
        raise InputError("model is in training mode, and a fast model is for inference; call model.eval() first")
    specs = list(layer_specs(model))
    policy, target = _check_choices(policy, specs, precision, device, model, calibration is not None)
    measured = None
    if calibration is not None:
        if PRECISIONS[precision].itemsize > 1:
            raise InputError(f'calibration is for precision "int8" and "fp8", not {precision!r}')
        batches = check_batches(calibration, model)
        exact = _assemble(model, "bf16", specs, Policy(winograd=False), model.device, None, progress)
        measured = Calibration.run(exact, batches, policy, precision)
        del exact
    fast = _assemble(model, precision, specs, policy, target, measured, progress)
    fast.graphs = graphs
    return fast


def fast_unet(
    model: VPD,
    precision: str = "fp32",
    policy: Policy | None = None,
    *,
    device: torch.device | str | None = None,
    graphs: bool = True,
) -> FastVPD:
    """A fast model of which only `features` can be called: the UNet with its maps, for other people's heads behind it.

    model: a plain float32 model, whose encoder and head may be on the meta device. precision, policy, device, graphs:
    as in `vpd_fast.optimize`. Raises InputError as that does.
    """
    _check_model(model, precision)
    specs = [spec for spec in layer_specs(model) if spec.name.startswith("unet.")]
    policy, target = _check_choices(policy, specs, precision, device, model)
    fast = _assemble(model, precision, specs, policy, target, None, progress=False)
    fast.graphs = graphs
    return fast


def _assemble(
    model: VPD,
    precision: str,
    specs: Sequence[Spec],
    policy: Policy,
    device: torch.device,
    measured: Calibration | None,
    progress: bool,
) -> FastVPD:
    layers, infos = _build_layers(specs, precision, policy, device, measured, progress)
    kept = {
        k: v.to(device, copy=True) for k, v in model.state_dict().items() if FastVPD.is_conditioning(model.config, k)
    }
    return FastVPD(model.config, kept, layers, infos, precision)


def _build_layers(
    specs: Sequence[Spec],
    precision: str,
    policy: Policy,
    device: torch.device,
    measured: Calibration | None = None,
    progress: bool = False,
) -> tuple[Layers, tuple[LayerInfo, ...]]:
    """The layers of `specs` by name, on the device, and what became of each."""
    layers, infos = Layers(), []
    with ProgressBar(len(specs), f"layers to {precision}", visible=progress) as bar:
        for spec in specs:
            scale = measured.scale(spec) if measured else None
            rounding = measured.rounding(spec) if measured else None
            layer, info = build_layer(spec, precision, policy, ACTIVATIONS[precision], scale, device.type, rounding)
            snr = measured.snr_db(spec, layer) if measured else None
            layers[spec.name] = layer.for_device(device)
            infos.append(replace(info, snr_db=snr))
            bar.update(advance=1)
    return layers, tuple(infos)


def _check_choices(
    policy: Policy | None,
    specs: Sequence[Spec],
    precision: str,
    device: torch.device | str | None,
    model: VPD,
    is_calibrated: bool = False,
) -> tuple[Policy, torch.device]:
    """The policy and the device that were meant. Raises InputError where they do not fit each other or the layers."""
    policy = Policy() if policy is None else policy
    if not isinstance(policy, Policy):
        raise InputError(f"policy must be a vpd_fast.engine.Policy, got {type(policy).__name__}")
    policy.check_names([spec.name for spec in specs if spec.kind != "group_norm"])
    target = _device(device, model)
    policy.check_device(precision, target)
    policy.check_static_rows(precision, target, is_calibrated)
    return policy, target


def _check_model(model: VPD, precision: str) -> None:
    """Raises InputError unless it is a plain float32 model on a device that we know, and a precision."""
    if isinstance(model, FastVPD):
        raise InputError("model is a fast model already; optimize the plain model")
    if not isinstance(model, VPD):
        raise InputError(f"model must be a vpd_fast.VPD, got {type(model).__name__}")
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}, got {brief(precision)}")
    if model.device.type not in ("cpu", "cuda"):
        raise InputError(f"model must be on the CPU or a GPU, got {model.device}")
    if model.dtype != torch.float32:
        raise InputError(f"model must be in float32, which is what layers are rounded from, got {model.dtype}")


def _device(device: torch.device | str | None, model: VPD) -> torch.device:
    try:
        found = model.device if device is None else torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"device must be the name of a device, got {brief(device)}") from error
    if found.type not in ("cpu", "cuda"):
        raise InputError(f"device must be the CPU or a GPU, got {found}")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device is {found}, but PyTorch finds no GPU")
    if found.type == "cuda" and found.index is None:
        found = torch.device("cuda", torch.cuda.current_device())
    return found


class FastEncoder(Engine):
    """`encode` of the fast form of a model, and nothing else of it. No gradients; several threads may call it at once.

    model: a plain float32 model, in training mode or not; its encoder's weights are copied, so later changes to them
    are not seen. precision, policy, device, graphs: as in `vpd_fast.optimize`. Raises InputError as that does.
    """

    def __init__(
        self,
        model: VPD,
        precision: str = "fp32",
        policy: Policy | None = None,
        *,
        device: torch.device | str | None = None,
        graphs: bool = True,
    ) -> None:
        _check_model(model, precision)
        # The encoder comes first, and the weights of what follows need not be looked at.
        specs = list(takewhile(lambda spec: spec.name.startswith("encoder."), layer_specs(model)))
        policy, target = _check_choices(policy, specs, precision, device, model)
        layers, infos = _build_layers(specs, precision, policy, target)
        super().__init__(layers, infos, precision, target)
        self.graphs = graphs
