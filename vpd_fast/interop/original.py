"""Models of VPD's original code, and of what builds on its backbone, made fast in place.

A model is recognised by its parts, not by its class: the module whose `unet.diffusion_model` is latent diffusion's UNet
(the original's `UNetWrapper`), and the KL encoder. What replaces a part is tried beside it first.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

from torch import nn

from vpd_fast.engine import FastVPD
from vpd_fast.errors import InputError, brief
from vpd_fast.interop._fast_parts import fast_autoencoder, fast_unet_wrapper
from vpd_fast.interop._plain_parts import PLACES, Attention, KLAttention, KLBlock
from vpd_fast.interop._replacements import RECORD, Replacements
from vpd_fast.models.vpd import VPD

M = TypeVar("M", bound=nn.Module)

_ATTENTION = ("to_q", "to_k", "to_v", "to_out", "heads", "scale")
_KL_ATTENTION = ("norm", "q", "k", "v", "proj_out")
_KL_BLOCK = ("norm1", "conv1", "norm2", "conv2")


class Parts(NamedTuple):
    """The parts of a model, with their names in it: the wrapper of its UNet, and its KL autoencoder."""

    wrapper: tuple[str, Any] | None
    autoencoder: tuple[str, Any] | None


def accelerate(model: M, precision: str | None = None) -> M:
    """Make an instance of the original repository's VPDSeg, VPDRefer or VPDDepth fast, in place; `restore` undoes it.

    model: such an instance, or one that has the same backbone, or the backbone alone (`UNetWrapper`, `AutoencoderKL`).
    precision: None: exact and trainable. The model keeps its own modules and parameters, so that optimizers,
        DistributedDataParallel, checkpoints and gradient checkpointing go on as before; attention is computed by fused
        operators that do not store probabilities, and its maps arrive where they did, detached as there.
        "fp32", "bf16", "int8", ...: for inference, UNet and encoder run through the engine as after
        `vpd_fast.optimize`; all the model's calls stay and return what they did. Later changes to its weights are not
        seen, until it is restored and accelerated again.

    Returns the model. Raises InputError, and leaves the model as it was, if it is of another architecture, accelerated
    already, has been changed so that the fast form would compute something else, or the precision is unknown.

        >>> model = init_segmentor(config, checkpoint)
        >>> vpd_fast.accelerate(model)
        >>> vpd_fast.restore(model)
    """
    parts = _parts(model)
    done = [name for name, module in model.named_modules() if RECORD in vars(module)]
    if done:
        raise InputError(f"{_called(model, done[0])} is accelerated already: call vpd_fast.restore with it first")
    if precision is None:
        replacements = _plain(parts)
    elif any(module.training for module in model.modules()):
        raise InputError(
            "with a precision a model is for inference, and this one is in training mode: call eval() first"
        )
    else:
        replacements = _fast(parts, precision)
    replacements.apply()
    vars(model)[RECORD] = replacements
    return model


def restore(model: M) -> M:
    """Undo `accelerate`: the model is what it was. Returns it.

    Raises InputError if it is not accelerated, or if what accelerate put in place was replaced since.
    """
    record = vars(model).get(RECORD) if isinstance(model, nn.Module) else None
    if record is None:
        raise InputError(
            f"{type(model).__name__} is not accelerated; expected the object that vpd_fast.accelerate was called with"
        )
    record.undo()
    del vars(model)[RECORD]
    return model


def _parts(model: Any) -> Parts:
    """The parts of a model of the original code. Raises InputError if it has none, or several of one kind."""
    expected = "expected a VPDSeg, VPDRefer or VPDDepth of the original code, or its UNetWrapper or KL autoencoder"
    if isinstance(model, (VPD, FastVPD)):
        raise InputError(
            f"accelerate is for models of the original code, and {type(model).__name__} is one of vpd_fast: use "
            'vpd_fast.optimize(model, precision), or model.attention_backend = "sdpa" to train'
        )
    if not isinstance(model, nn.Module):
        raise InputError(f"{expected}, got {type(model).__name__}")
    wrappers = [(n, m) for n, m in model.named_modules() if _is_wrapper(m)]
    autoencoders = [(n, m) for n, m in model.named_modules() if _is_autoencoder(m)]
    if len(wrappers) > 1 or len(autoencoders) > 1:
        raise InputError(
            f"{type(model).__name__} has {len(wrappers)} UNets and {len(autoencoders)} KL encoders, expected one: "
            "accelerate each of its models alone"
        )
    if not wrappers and not autoencoders:
        hint = ""
        if hasattr(model, "attn_processors"):
            hint = "; for UNets of diffusers there is vpd_fast.interop.diffusers"
        raise InputError(f"{expected}, got {type(model).__name__}, which has neither{hint}")
    if any(tensor.is_meta for tensor in model.parameters()):
        raise InputError(f"{type(model).__name__} has parameters on the meta device: load its weights first")
    return Parts(next(iter(wrappers), None), next(iter(autoencoders), None))


def _is_wrapper(module: nn.Module) -> bool:
    unet = getattr(getattr(module, "unet", None), "diffusion_model", None)
    return isinstance(unet, nn.Module) and hasattr(unet, "output_blocks") and hasattr(unet, "time_embed")


def _is_autoencoder(module: nn.Module) -> bool:
    encoder = getattr(module, "encoder", None)
    return hasattr(module, "quant_conv") and hasattr(encoder, "conv_in") and hasattr(encoder, "mid")


def _called(model: nn.Module, name: str) -> str:
    return f"{type(model).__name__}.{name}" if name else type(model).__name__


def _plain(parts: Parts) -> Replacements:
    """Fused operators in the place of what attention and the KL encoder's blocks compute."""
    replacements = Replacements()
    if parts.wrapper is not None:
        name, wrapper = parts.wrapper
        for key, module in _having(wrapper.unet.diffusion_model, _ATTENTION):
            store, place = _hook(key, module)
            replacements.add(Attention(key, module, store, place, _wants_self_maps(wrapper)))
        if not replacements.added:
            raise InputError(f"{name or type(wrapper).__name__} has no attention that is known")
    if parts.autoencoder is not None:
        _, autoencoder = parts.autoencoder
        for key, module in _having(autoencoder.encoder, _KL_ATTENTION):
            replacements.add(KLAttention(key, module))
        for key, module in _having(autoencoder.encoder, _KL_BLOCK):
            replacements.add(KLBlock(key, module))
    for replacement in replacements.added:
        replacement.try_out()
    return replacements


def _fast(parts: Parts, precision: str) -> Replacements:
    """The engine in the place of UNet and encoder."""
    replacements = Replacements()
    if parts.wrapper is not None:
        for key, module in _having(parts.wrapper[1].unet.diffusion_model, _ATTENTION):
            _hook(key, module)
        replacements.add(fast_unet_wrapper(*parts.wrapper, precision))
    if parts.autoencoder is not None:
        replacements.add(fast_autoencoder(*parts.autoencoder, precision))
    return replacements


def _having(root: nn.Module, attributes: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Modules that have all these attributes, and their names."""
    for name, module in root.named_modules():
        if all(hasattr(module, attribute) for attribute in attributes):
            yield name, module


def _hook(name: str, module: nn.Module) -> tuple[Any, str]:
    """The store that the original's hook hands this attention's maps to, and its place; (None, "") without hook.

    Raises InputError if `forward` is somebody else's.
    """
    forward = vars(module).get("forward")
    if forward is None:
        return None, ""
    values = list(inspect.getclosurevars(forward).nonlocals.values()) if inspect.isfunction(forward) else []
    stores = [value for value in values if callable(value) and isinstance(getattr(value, "step_store", None), dict)]
    places = [value for value in values if isinstance(value, str) and value in PLACES]
    if len(stores) != 1 or len(places) != 1 or not any(value is module for value in values):
        raise InputError(
            f"{name}.forward is {brief(forward)}, not the hook of the original's register_attention_control: undo what "
            "replaced it before accelerating"
        )
    return stores[0], places[0]


def _wants_self_maps(wrapper: nn.Module) -> bool:
    """Whether maps of self-attention are used: the original stores and never reads them, its successors may."""
    settings = {name: value for name, value in vars(wrapper).items() if not name.startswith("_")}
    asked = any("self" in name and value for name, value in settings.items())
    return asked or "attn_selector" not in settings or "self" in str(settings["attn_selector"])
