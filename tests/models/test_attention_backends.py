"""Attention through fused operators and libraries: the plain model's results and gradients, without probabilities."""

from __future__ import annotations

import copy
import dataclasses
import re
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vpd_fast import VPD, BackboneConfig, VPDConfig
from vpd_fast.errors import InputError, MissingDependencyError
from vpd_fast.models import attention, attention_backends
from vpd_fast.models.attention import CrossAttention
from vpd_fast.models.autoencoder import AttnBlock
from vpd_fast.models.random_weights import randomize

from ..helpers.threads import results_of_threads

RTOL = 1e-4  # relative L2 of float32 tensors, as in test_golden.py
LAYERS = 10  # transformer blocks in the UNet
MAPPED = 6  # of them with maps: three at each of two levels


@pytest.fixture
def make(tiny_backbone: BackboneConfig) -> Callable[..., VPD]:
    """`make(task, backend)` -> the small model with random weights, always the same."""

    def make(task: str = "segmentation", backend: str = "sdpa", **fields: object) -> VPD:
        sizes = {"num_classes": 3, "tokens": 5, "num_scenes": 4, "channels": 32, "base_size": 128}
        config = VPDConfig(task=task, **{**sizes, "backbone": tiny_backbone, **fields})
        model = randomize(VPD.empty(config), 0).eval()
        model.attention_backend = backend
        return model

    return make


def images(size: int = 64, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, size, size) * 2 - 1


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def gradients(model: VPD, x: Tensor) -> dict[str, Tensor | None]:
    model(x).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


class Recorder(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def recorded(function: Callable, *args: object) -> list[str]:
    with Recorder() as recorder:
        function(*args)
    return recorder.names


@pytest.mark.parametrize("task", ["segmentation", "referring", "depth"])
def test_the_switch_reaches_every_layer_and_is_not_part_of_the_model(make: Callable, task: str) -> None:
    model = make(task, "plain")
    assert VPD.empty(model.config).attention_backend == "plain"
    layers = [m for m in model.modules() if isinstance(m, (CrossAttention, AttnBlock))]
    assert len(layers) == 2 * LAYERS + 1
    keys = list(model.state_dict())
    for name in ("sdpa", "plain"):
        model.attention_backend = name
        assert model.attention_backend == name
        assert {m.attention_backend for m in layers} == {name}
        assert copy.deepcopy(model).attention_backend == name
    assert list(model.state_dict()) == keys
    assert "attention_backend" not in model.config.to_dict()


@pytest.mark.parametrize("name", ["flash", "", None, "SDPA"])
def test_unknown_names(make: Callable, name: object) -> None:
    model = make()
    with pytest.raises(InputError, match=f"'plain', 'sdpa', 'xformers', 'flash-attn', got {name!r}"):
        model.attention_backend = name
    assert model.attention_backend == "sdpa"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_attn_size": 16},
        {"attn_selector": "mid_cross+up_cross"},
        {"attn_selector": "up_cross+up_self"},
        {"attn_selector": "mid_self+down_self", "max_attn_size": 16},
        {"use_attn": False},
    ],
    ids=str,
)
@torch.inference_mode()
def test_features_and_logits_agree_with_plain(make: Callable, fields: dict) -> None:
    x, plain, fused = images(128, batch=2), make(backend="plain", **fields), make(**fields)
    assert error(fused.encode(x), plain.encode(x)) <= RTOL
    expected = plain.extract_feat(x)
    actual = fused.extract_feat(x)
    widths = [plain.config.backbone.model_channels * m for m in plain.config.backbone.channel_mult]
    for a, b, width in zip(actual, expected, widths, strict=True):
        assert error(a[:, :width], b[:, :width]) <= RTOL
        assert a.shape[1] == width or error(a[:, width:], b[:, width:]) <= RTOL  # maps are small beside the channels
    assert error(fused.decode(actual), plain.decode(expected)) <= RTOL


@torch.inference_mode()
def test_other_tasks_agree_with_plain(make: Callable) -> None:
    x, tokens = images(batch=2), torch.randn(2, 5, 64)
    assert error(make("referring")(x, tokens), make("referring", "plain")(x, tokens)) <= RTOL
    scenes = torch.tensor([0, 3])
    depths = [make("depth", backend, use_attn=True)(x, scenes)["pred_d"] for backend in ("sdpa", "plain")]
    assert error(*depths) <= RTOL


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [False, True])
def test_no_probabilities_are_stored(make: Callable, memory_format: torch.memory_format, training: bool) -> None:
    x = images().to(memory_format=memory_format)
    for backend, expected in (("plain", 2 * LAYERS + 1), ("sdpa", 0)):
        model = make(backend=backend, train_encoder=training).to(memory_format=memory_format)
        with torch.set_grad_enabled(training):
            names = recorded(model.extract_feat, x)
        assert sum("softmax" in name for name in names) == expected
    assert names.count("cross_attention_maps") == LAYERS
    assert sum("flash_attention" in name for name in names) == LAYERS + 1


@torch.inference_mode()
def test_the_mean_over_layers_needs_no_second_pass(make: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counting(*args: object, **options: object) -> object:
        out, maps = operator(*args, **options)
        calls.append((options["need_maps"], options["weight"], options["addend"], maps))
        return out, maps

    operator = attention.cross_attention_maps
    monkeypatch.setattr(attention, "cross_attention_maps", counting)
    model = make()
    _, maps = model.split_maps(model.extract_feat(images()))
    made = [call for call in calls if call[0]]
    assert (len(calls), len(made)) == (LAYERS, MAPPED)
    assert {call[1] for call in made} == {1 / 3}
    results = [call[3] for call in made]
    firsts = [call for call in made if call[2] is None]
    assert len(firsts) == 2  # levels
    for _, _, addend, _ in made:
        assert addend is None or any(addend is result for result in results)  # what the layer before it gave
    for m in maps.values():
        torch.testing.assert_close(m.sum(1), torch.ones_like(m[:, 0]))


@torch.inference_mode()
def test_a_shared_text_is_projected_once(make: Callable) -> None:
    model = make()
    shapes = []
    for module in model.modules():
        if isinstance(module, CrossAttention) and module.to_k.in_features == 64 != module.to_q.in_features:
            module.to_k.register_forward_hook(lambda layer, args, out: shapes.append(out.shape[0]))
    x, text = images(batch=2), model.context(2)
    shared = model.extract_feat(x)
    assert set(shapes) == {1}
    shapes.clear()
    different = model.features(model.encode(x), text.clone())
    assert set(shapes) == {2}
    for a, b in zip(shared, different, strict=True):
        assert error(a, b) <= RTOL


@pytest.mark.parametrize("map_grad", [False, True])
def test_gradients_are_those_of_plain(make: Callable, map_grad: bool) -> None:
    """In float64, where nothing hides behind rounding; test_golden.py has float32."""
    x = images(batch=2).double()
    expected = gradients(make(backend="plain", map_grad=map_grad, train_encoder=True).double(), x)
    actual = gradients(make(map_grad=map_grad, train_encoder=True).double(), x)
    scale = max(g.norm().item() for g in expected.values() if g is not None)
    for name, gradient in expected.items():
        assert (actual[name] is None) is (gradient is None), name
        if gradient is not None:  # 1e-16 per operation, some thousand of them; biases before a norm have gradient zero
            assert (actual[name] - gradient).norm() <= 1e-9 * gradient.norm() + 1e-12 * scale, name


@pytest.mark.parametrize("map_grad", [False, True])
def test_gradients_flow_through_the_maps_only_if_asked(make: Callable, map_grad: bool) -> None:
    model = make(map_grad=map_grad)
    _, maps = model.split_maps(model.extract_feat(images()))
    (maps[1] ** 2).sum().backward()
    layers = {name: p.grad for name, p in model.named_parameters() if name.endswith("attn2.to_k.weight")}
    # The last layer with a map at level 1, and the first.
    for place in ("output_blocks.5.1", "input_blocks.3.1"):
        (gradient,) = (g for name, g in layers.items() if place in name)
        assert (gradient is not None and gradient.abs().max().item() > 0) is map_grad


@pytest.mark.parametrize("map_grad", [False, True])
def test_checkpointing_changes_no_gradient_and_makes_each_map_once(
    make: Callable, monkeypatch: pytest.MonkeyPatch, map_grad: bool
) -> None:
    made = []

    def counting(*args: object, **options: object) -> object:
        made.append(options["need_maps"])
        return operator(*args, **options)

    operator = attention.cross_attention_maps
    monkeypatch.setattr(attention, "cross_attention_maps", counting)
    x, found, counts = images(), [], []
    for enabled in (False, True):
        model = make(map_grad=map_grad)
        model.gradient_checkpointing_enable(enabled)
        made.clear()
        found.append(gradients(model, x))
        counts.append((len(made), sum(made)))
    assert counts == [(LAYERS, MAPPED), (2 * LAYERS, MAPPED)]
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("backend", ["plain", "sdpa"])
@pytest.mark.parametrize("map_grad", [False, True])
def test_checkpointing_with_self_maps(make: Callable, backend: str, map_grad: bool) -> None:
    x, found = images(128), []
    for enabled in (False, True):
        model = make(backend=backend, map_grad=map_grad, attn_selector="up_self+up_cross+mid_self")
        model.gradient_checkpointing_enable(enabled)
        found.append(gradients(model, x))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("backend", ["plain", "sdpa"])
def test_with_one_token_queries_get_a_zero_gradient(make: Callable, backend: str) -> None:
    """Not None: optimisers would skip the weight (and its decay), and DDP would wait for it."""
    model = make("depth", backend)
    model(torch.rand(1, 3, 64, 64), torch.tensor([1]))["pred_d"].mean().backward()
    weights = {n: p for n, p in model.named_parameters() if n.endswith(("attn2.to_q.weight", "attn2.to_k.weight"))}
    assert len(weights) == 2 * LAYERS
    for name, p in weights.items():
        assert p.grad is not None, name
        assert p.grad.abs().max().item() == 0, name


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_autocast(make: Callable, small_backbone: BackboneConfig, checkpointing: bool) -> None:
    x = images()
    with torch.no_grad():
        exact = make(backend="plain", backbone=small_backbone).extract_feat(x)
    features = {}
    for backend in ("plain", "sdpa"):
        model = make(backend=backend, backbone=small_backbone)
        model.gradient_checkpointing_enable(checkpointing)
        with torch.autocast("cpu", torch.bfloat16):
            features[backend] = model.extract_feat(x)
        sum(f.float().square().mean() for f in features[backend]).backward()
        assert all(p.grad.isfinite().all() for p in model.unet.parameters() if p.grad is not None)
    for plain, fused, truth in zip(features["plain"], features["sdpa"], exact, strict=True):
        assert fused.dtype == plain.dtype
        assert error(fused, truth) <= 2 * error(plain, truth)  # the budget of operators: twice eager's error


@pytest.mark.parametrize(
    ("backend", "compiler"),
    [
        ("sdpa", "eager"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("sdpa", "aot_eager"), ("plain", "eager"))),
    ],
)
def test_compiled_in_one_graph_with_checkpointing(
    make: Callable, tiny_backbone: BackboneConfig, backend: str, compiler: str
) -> None:
    backbone = dataclasses.replace(tiny_backbone, attention_resolutions=(2,))
    model = make(backend=backend, backbone=backbone, map_grad=True)
    latents, text = torch.randn(2, 4, 8, 8), model.context(2).detach()

    def run(function: Callable) -> tuple[list[Tensor], dict[str, Tensor | None]]:
        model.zero_grad()
        features = function(latents, text)
        sum(f.square().mean() for f in features).backward()
        return features, {name: p.grad for name, p in model.named_parameters()}

    expected, expected_gradients = run(model.features)
    model.gradient_checkpointing_enable()
    actual, actual_gradients = run(torch.compile(model.features, fullgraph=True, backend=compiler))
    for a, b in zip(actual, expected, strict=True):
        assert error(a, b) <= RTOL
    scale = max(g.norm() for g in expected_gradients.values() if g is not None)
    for name, gradient in expected_gradients.items():
        assert (actual_gradients[name] is None) is (gradient is None), name
        if gradient is not None:
            assert (actual_gradients[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6 * scale, name


def test_threads(make: Callable) -> None:
    model = make()
    inputs = [images(64 * (1 + i % 2)) for i in range(4)]
    with torch.inference_mode():
        expected = [model(x) for x in inputs]
    results = results_of_threads(torch.inference_mode()(model.__call__), inputs)
    for a, b in zip(results, expected, strict=True):
        assert error(a, b) <= RTOL


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Modules with the functions that we call of xformers and flash-attn; returns the shapes of their queries."""
    shapes: list[tuple[int, ...]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        assert q.shape == k.shape == v.shape  # (B, N, heads, D)
        assert scale == q.shape[3] ** -0.5
        shapes.append(tuple(q.shape))
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        return attend(query, key, value, scale)

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        return attend(q, k, v, softmax_scale)

    xformers, ops, flash = (ModuleType(name) for name in ("xformers", "xformers.ops", "flash_attn"))
    xformers.ops, ops.memory_efficient_attention, flash.flash_attn_func = (
        ops,
        memory_efficient_attention,
        flash_attn_func,
    )
    for module in (xformers, ops, flash):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return shapes


@pytest.mark.parametrize("backend", ["xformers", "flash-attn"])
@torch.no_grad()
def test_libraries_do_the_self_attention(
    make: Callable, stand_ins: list, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    x = images(batch=2)
    expected = make().extract_feat(x)
    monkeypatch.setattr(attention_backends, "_why_not", lambda *args: None)  # they could not run here
    model = make(backend=backend)
    names = recorded(model.encode, x)
    assert sum("flash_attention" in name for name in names) == 1  # SDPA's: one head of 512 channels is too wide
    assert stand_ins == []
    actual = model.extract_feat(x)
    assert len(stand_ins) == LAYERS
    assert {shape[0] for shape in stand_ins} == {2}
    assert {shape[1:] for shape in stand_ins} == {(64, 4, 8), (16, 4, 8), (4, 4, 16), (1, 4, 16)}
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("backend", "module", "found"),
    [
        ("xformers", "xformers.ops", None),
        ("flash-attn", "flash_attn", None),
        ("flash-attn", "flash_attn", OSError("undefined symbol: of_another_torch")),
    ],
)
def test_a_missing_package_is_an_error_that_says_what_to_install(
    make: Callable, monkeypatch: pytest.MonkeyPatch, backend: str, module: str, found: OSError | None
) -> None:
    if found is None:
        monkeypatch.setitem(sys.modules, module, None)
    else:

        def fail(name: str) -> None:
            raise found

        monkeypatch.setattr(attention_backends.importlib, "import_module", fail)
    model = make(backend="plain")
    with pytest.raises(MissingDependencyError, match=rf"pip install 'vpd_fast\[{backend}\]'") as caught:
        model.attention_backend = backend
    assert model.attention_backend == "plain"
    assert found is None or str(found) in str(caught.value)


@pytest.mark.parametrize("backend", ["xformers", "flash-attn"])
def test_a_library_that_cannot_run_is_one_clear_error(make: Callable, stand_ins: list, backend: str) -> None:
    model = make(backend=backend)
    with pytest.raises(InputError, match=f"attention backend '{backend}' needs a GPU, got tensors on cpu; 'sdpa' runs"):
        model(images())
    assert stand_ins == []


@pytest.mark.parametrize(
    ("backend", "dtype", "width", "reason"),
    [
        ("xformers", torch.float32, 320, None),
        ("xformers", torch.float64, 320, "needs torch.float16 or torch.bfloat16 or torch.float32 .*got torch.float64"),
        ("flash-attn", torch.float16, 320, None),
        ("flash-attn", torch.bfloat16, 8 * 256, None),
        ("flash-attn", torch.float32, 320, "needs torch.float16 or torch.bfloat16 .*got torch.float32"),
        ("flash-attn", torch.bfloat16, 8 * 264, "heads of at most 256 channels, got 264"),
        ("sdpa", torch.float64, 8 * 512, None),
    ],
)
def test_what_libraries_take_on_a_gpu(backend: str, dtype: torch.dtype, width: int, reason: str | None) -> None:
    q = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(1, 64, width))
    found = attention_backends._why_not(backend, q, 8)
    assert (found is None) is (reason is None)
    assert reason is None or re.search(reason, found)
