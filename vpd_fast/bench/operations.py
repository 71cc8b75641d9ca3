"""What a pass of a fast model computes: every operation, its products, exponentials and bytes.

The engine's own code runs, on tensors without memory if need be, and its operators are counted while they are called;
so the list follows the code.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vpd_fast import VPD, VPDConfig
from vpd_fast.bench.engine_pass import Label, labelled
from vpd_fast.bench.peaks import Device
from vpd_fast.engine import Policy
from vpd_fast.engine.build import LayerInfo, build_layer
from vpd_fast.engine.layers import Layer
from vpd_fast.engine.model import FastVPD
from vpd_fast.engine.policy import ACTIVATIONS
from vpd_fast.engine.specs import Spec, layer_specs
from vpd_fast.engine.workspace import Workspace, WorkspacePool

WINOGRAD = {16: 4 / 9, 36: 1 / 4, 9: 1 / 4}  # products made, by taps, of those of a direct convolution
WEIGHTS = ("data", "scales", "weight_sums")  # arguments of operators that are the packed weight
KNOWN = {"x": "statistics", "x2": "statistics2"}  # inputs of group_norm_affine that are not read if it is given these
GLUE = "glue"  # operations of PyTorch between the layers


@dataclass
class Operation:
    """What one operation needs; all operands counted once, in the dtypes they have.

    gflop: products by definition, times 2. made: those that are made, fewer with Winograd's algorithm. gexp: 10^9
    exponentials. weights, read, written: 10^6 bytes; `read` is without the weights.
    """

    label: Label
    gflop: float = 0.0
    made: float = 0.0
    gexp: float = 0.0
    weights: float = 0.0
    read: float = 0.0
    written: float = 0.0
    operators: list[str] = field(default_factory=list)

    @property
    def mb(self) -> float:
        """All bytes, in 10^6."""
        return self.weights + self.read + self.written

    def floor(self, device: Device) -> tuple[float, str]:
        """Milliseconds, and what limits it."""
        seconds, bound = device.seconds(self.label.precision, self.made * 1e9, self.mb * 1e6, self.gexp * 1e9)
        return seconds * 1e3, bound


class ValuesAreFine(TorchFunctionMode):
    """Nobody asks for the values of tensors: checks of them pass, and a text that was seen before is the same one.

    Tensors without memory have none, and while a CUDA graph is captured there are none yet. Those without memory get
    addresses, by which the engine tells its buffers apart.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """True instead of a look at values."""
        if func in (Tensor.__bool__, torch.equal):
            return True
        if func is Tensor.data_ptr and args[0].is_meta:
            return args[0].untyped_storage()._cdata
        return func(*args, **(kwargs or {}))


def workspaces(device: torch.device, kind: str) -> WorkspacePool:
    """Memory of a model for one call at a time that finds statistics where that kind of device does."""
    pool, memory = WorkspacePool(device), Workspace(device)
    memory.finds_statistics = Workspace(torch.device(kind)).finds_statistics
    pool._idle.append(memory)
    return pool


def empty_engine(config: VPDConfig, precision: str, kind: str, policy: Policy | None = None) -> FastVPD:
    """The fast model for a kind of device, of tensors without memory: it can be called, but computes nothing."""
    plain, dtype, policy = VPD.empty(config).eval(), ACTIVATIONS[precision], policy or Policy()

    def build(spec: Spec) -> tuple[Layer, LayerInfo]:
        rounding = None
        if policy.has_static_rows(spec, precision):
            rounding = torch.empty(2, spec.make()[0].shape[1], device="meta")
        return build_layer(spec, precision, policy, dtype, device=kind, rounding=rounding)

    with ValuesAreFine():
        built = [build(spec) for spec in layer_specs(plain)]
    layers = {info.name: layer for layer, info in built}
    kept = {name: t for name, t in plain.state_dict().items() if FastVPD.is_conditioning(config, name)}
    model = FastVPD(config, kept, layers, tuple(info for _, info in built), precision)
    model._workspaces = workspaces(model.device, kind)
    return model


def trace(model: FastVPD, images: Tensor, first: bool = False) -> list[Operation]:
    """The operations of one pass in their order, on tensors with or without memory.

    first: of a pass with a text that was not seen before, whose keys and values are computed, too.
    """
    with labelled(model) as run, torch.no_grad(), ValuesAreFine():
        run.prepare(len(images))
        if not first:
            run(images)
        with _Counter() as counter:
            run(images, counter.around, counter.on_stage)
    return counter.operations


class _Counter(TorchDispatchMode):
    """Adds up what PyTorch is asked to compute, under the label of the operation at hand."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._current: Operation | None = None
        self._stage = ""

    def on_stage(self, stage: str) -> None:
        self._stage = stage

    def around(self, label: Label, call: Callable[[], Any]) -> Any:
        self._current = Operation(label)
        try:
            return call()
        finally:
            self.operations.append(self._current)
            self._current = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not _moves_bytes(func):
            return result
        target = self._current
        if target is None:
            name = func._schema.name.partition("::")[2].removeprefix("_")
            precision = "bf16" if any(x.dtype == torch.bfloat16 for x in _tensors(result)) else "fp32"
            target = Operation(Label(self._stage, name, GLUE, f"{self._stage} {name}", precision, 0))
            self.operations.append(target)
        _add(target, func, args, kwargs or {}, result)
        return result


def _moves_bytes(func: Any) -> bool:
    """Whether an operator computes or copies something: no view, and no memory alone."""
    schema = func._schema
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return not view and not schema.name.partition("::")[2].startswith(("empty", "new_empty"))


def _tensors(*trees: Any) -> list[Tensor]:
    return [x for x in tree_leaves(trees) if isinstance(x, Tensor)]


def _mb(x: Tensor) -> float:
    """10^6 bytes of memory that a tensor has, be it expanded or not."""
    sizes = (size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)
    return math.prod(sizes) * x.element_size() / 1e6


def _add(target: Operation, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
    """Counts one call of an operator."""
    schema = func._schema
    given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    in_place = _tensors([given.get(name) for name in written])
    name, ours = schema.name.partition("::")[2], func.namespace == "vpd_fast"
    target.operators.append(name)
    seen: list[Tensor] = []  # k and v of attention may be one tensor
    for argument, value in given.items():
        if argument in written and not (given.get("accumulate") if ours else name != "copy_"):
            continue  # what was there is not read
        if name == "group_norm_affine" and given.get(KNOWN.get(argument)) is not None:
            continue
        for x in _tensors(value):
            if any(x is other for other in seen):
                continue
            seen.append(x)
            if ours and argument in WEIGHTS:
                target.weights += _mb(x)
            else:
                target.read += _mb(x)
    fresh = [x for x in _tensors(result) if not any(x is other for other in in_place)]
    target.written += sum(_mb(x) for x in (*in_place, *fresh))
    if ours:
        if name not in _PRODUCTS:
            sys.exit(f"operations.py cannot count the operator {name}; add it to _PRODUCTS")
        made, over, exponentials = _PRODUCTS[name](given)
        over = over if target.label.definition is None else target.label.definition
        target.made, target.gflop = target.made + made / 1e9, target.gflop + made * over / 1e9
        target.gexp += exponentials / 1e9
    elif func._overloadpacket in flop_registry:
        made = flop_registry[func._overloadpacket](*args, **kwargs, out_val=result) / 1e9
        target.made, target.gflop = target.made + made, target.gflop + made


# What an operator's arguments say: multiplications and additions that are made, those by definition over them, and
# exponentials. Those of SiLU and GELU are left out: beside the products and bytes around them they are few.
Count = tuple[float, float, float]


def _channels(given: dict[str, Any]) -> int:
    return given["x"].shape[-1] + (0 if given["x2"] is None else given["x2"].shape[-1])


def _rows(given: dict[str, Any], k: int) -> Count:
    """Every position of the result times a weight of k columns."""
    positions = given["out"].numel() // given["out"].shape[-1]
    return 2.0 * positions * given["n"] * k, 1.0, 0.0


def _conv2d(given: dict[str, Any]) -> Count:
    return _rows(given, math.prod(given["kernel"]) * _channels(given))


def _winograd(given: dict[str, Any]) -> Count:
    share = WINOGRAD[given["data"].shape[0]]
    direct, _, _ = _rows(given, 9 * _channels(given))
    return direct * share, 1 / share, 0.0


def _attention(given: dict[str, Any]) -> Count:
    q, keys = given["q"], given["k"].shape[1]
    return 4.0 * q.numel() * keys, 1.0, float(q.shape[0] * q.shape[1] * given["heads"] * keys)


_PRODUCTS: dict[str, Callable[[dict[str, Any]], Count]] = {
    "linear": lambda given: _rows(given, _channels(given)),
    "conv2d": _conv2d,
    "winograd_conv2d": _winograd,
    **dict.fromkeys(("self_attention", "cross_attention_maps", "cross_attention_maps_into"), _attention),
    **dict.fromkeys(("group_norm_affine", "upsample_argmax"), lambda _: (0.0, 1.0, 0.0)),
}
