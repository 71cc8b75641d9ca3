"""A whole fast model computed by the Triton kernels, interpreted: what a GPU will run, but for its speed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import vpd_fast
from vpd_fast import VPD, BackboneConfig, VPDConfig, ops
from vpd_fast.bench.parity import cosine
from vpd_fast.engine import Policy
from vpd_fast.engine.workspace import Workspace
from vpd_fast.models.random_weights import randomize
from vpd_fast.ops import _dispatch
from vpd_fast.ops.availability import triton_missing

from .golden_cases import assert_agrees_with_the_original

pytestmark = pytest.mark.skipif(
    triton_missing(torch.empty(0)) is not None, reason="interpreted only without a GPU; tests marked gpu run there"
)
SMALL = BackboneConfig(
    model_channels=32, num_heads=2, context_dim=16, vae_ch=32, vae_num_res_blocks=1, num_res_blocks=1
)
# Of features and result; narrow networks suffer more from rounding than the one they stand for.
GATES = {"fp32": 0.9999, "bf16": 0.999, "fp16": 0.999, "int8": 0.98, "fp8": 0.95}


@pytest.fixture
def used(monkeypatch) -> set[str]:
    """Triton kernels come first; the operators that they computed."""
    names: set[str] = set()
    choose = _dispatch.Op.choose

    def triton_first(self: _dispatch.Op, impl: str, arguments: object) -> _dispatch.Implementation:
        for candidate in self.implementations:
            if impl == "auto" and candidate.name == "triton" and candidate.refuse(arguments) is None:
                names.add(self.name)
                return candidate
        return choose(self, impl, arguments)

    monkeypatch.setattr(_dispatch.Op, "choose", triton_first)
    find_statistics(monkeypatch)
    return names


def find_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, kernels find the statistics of their results on the way."""
    make = Workspace.__init__

    def with_statistics(self: Workspace, device: torch.device) -> None:
        make(self, device)
        self.finds_statistics = True

    monkeypatch.setattr(Workspace, "__init__", with_statistics)


@pytest.mark.slow
@pytest.mark.parametrize("precision", GATES)
def test_agrees_with_the_plain_model(used: set[str], precision: str) -> None:
    config = VPDConfig(num_classes=5, channels=32, base_size=64, backbone=SMALL)
    model, images = randomize(VPD(config), seed=1).eval(), torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        expected = [*model.extract_feat(images), model(images)]
    fast = vpd_fast.optimize(model, precision, policy=Policy(winograd=False, emulate=True))
    features = fast.extract_feat(images)
    for actual, plain in zip([*features, fast.decode(features, images.shape[2:])], expected, strict=True):
        print(f"{precision}: cosine {cosine(actual, plain):.6f}")
        assert cosine(actual, plain) >= GATES[precision]
    attention = {"self_attention", "cross_attention_maps", "cross_attention_maps_into"}
    assert used == {"linear", "conv2d", "group_norm_affine", *attention}


@pytest.mark.parametrize("precision", ["fp32", "int8", "fp8"])
def test_statistics_on_the_way_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """Computed by the references of the operators."""
    config = VPDConfig(num_classes=5, channels=32, base_size=64, backbone=SMALL)
    model, images = randomize(VPD(config), seed=1).eval(), torch.rand(1, 3, 64, 64) * 2 - 1
    choose = _dispatch.Op.choose
    monkeypatch.setattr(_dispatch.Op, "choose", lambda self, _, args: choose(self, "reference", args))
    fast = vpd_fast.optimize(model, precision, policy=Policy(winograd=False, emulate=True))
    expected = fast.extract_feat(images)
    find_statistics(monkeypatch)
    asked: list[str] = []
    affine = ops.group_norm_affine
    monkeypatch.setattr(ops, "group_norm_affine", lambda *a, **k: asked.extend(k) or affine(*a, **k))
    fast = vpd_fast.optimize(model, precision, policy=Policy(winograd=False, emulate=True))
    actual = fast.extract_feat(images)
    norms = [info.name for info in fast.infos if info.kind == "group_norm"]
    assert asked.count("statistics") == len(norms) - 2  # upsampling of 1x1 and 2x2 positions makes no whole runs
    blocks = sum(name.endswith((".norm1", ".norm2")) for name in norms)  # the others are followed by other layers
    assert asked.count("ranges") == (0 if precision == "fp32" else blocks)
    least = {"fp32": 0.9999999, "int8": 0.99, "fp8": 0.95}[precision]  # 8-bit images have one scale instead of many
    for one, other in zip(actual, expected, strict=True):
        assert cosine(one, other) >= least


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8", "fp8"])
def test_arithmetic_of_gpus_agrees_with_the_original(
    golden: Callable, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """The full-size golden model, computed by the references of the operators with what differs on GPUs.

    That is one scale for a whole image in 8-bit convolutions, ranges and group norms from statistics that layers find
    on the way, four phases instead of Winograd's algorithm, and the formats that only GPUs have.
    """
    find_statistics(monkeypatch)
    case = golden("seg_sd15")
    model, inputs, expected = case.model(), case.inputs(), case.tensors
    fast = vpd_fast.optimize(model, precision, policy=Policy(winograd=False, emulate=True))
    del model
    gate = {"bf16": 0.999, "fp16": 0.999, "int8": 0.996, "fp8": 0.98}[precision]
    assert_agrees_with_the_original(case, inputs, expected, fast, gate)
