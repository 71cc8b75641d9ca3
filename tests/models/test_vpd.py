"""The models beyond the golden cases: sizes, selectors, map gradients, checkpointing, threads, bad input."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vpd_fast import VPD, BackboneConfig, VPDConfig
from vpd_fast.errors import InputError
from vpd_fast.models import VPDDepth, VPDReferring, VPDSegmentation
from vpd_fast.models.attention import CrossAttention
from vpd_fast.models.random_weights import randomize

from ..helpers.threads import results_of_threads

WIDTHS = (32, 32, 64, 64)


@pytest.fixture
def make(tiny_backbone: BackboneConfig) -> Callable[..., VPD]:
    def make(task: str = "segmentation", seed: int = 0, **fields: object) -> VPD:
        sizes = {"num_classes": 3, "tokens": 5, "num_scenes": 4, "channels": 32, "base_size": 128}
        config = VPDConfig(task=task, **{**sizes, "backbone": tiny_backbone, **fields})
        return randomize(VPD.empty(config), seed).eval()

    return make


def images(height: int = 128, width: int = 128, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, height, width) * 2 - 1


def test_the_task_decides_the_class(make: Callable) -> None:
    for task, cls in {"segmentation": VPDSegmentation, "referring": VPDReferring, "depth": VPDDepth}.items():
        model = make(task)
        assert type(model) is cls
        assert isinstance(model, VPD)
        assert type(copy.deepcopy(model)) is cls
        assert model.task == task
    with pytest.raises(InputError, match="VPDConfig, got str"):
        VPD("segmentation")
    with pytest.raises(InputError, match="must be 'depth', got 'segmentation'"):
        VPDDepth(VPDConfig())


@pytest.mark.parametrize(("height", "width"), [(64, 192), (192, 128), (64, 64)])
def test_any_multiple_of_64_square_or_not(make: Callable, height: int, width: int) -> None:
    x = images(height, width, batch=2)
    segmentation, referring = make(), make("referring")
    with torch.inference_mode():
        assert segmentation(x).shape == (2, 3, height, width)
        assert referring(x, torch.randn(2, 5, 64)).shape == (2, 2, height, width)
        features = segmentation.extract_feat(x)
    assert [tuple(f.shape[2:]) for f in features] == [(height // s, width // s) for s in (8, 16, 32, 64)]
    _, maps = segmentation.split_maps(features)
    assert set(maps) == {1, 2}
    for m in maps.values():
        torch.testing.assert_close(m.sum(1), torch.ones_like(m[:, 0]))  # every position's probabilities


def test_a_wide_image_is_the_transpose_of_a_tall_one_for_the_maps(make: Callable) -> None:
    """Rows and columns are not mixed up: with symmetric kernels the model commutes with transposition."""
    model = make()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data = (module.weight + module.weight.transpose(2, 3)) / 2
    x = images(64, 192)
    with torch.inference_mode():
        wide, tall = model.extract_feat(x), model.extract_feat(x.transpose(2, 3))
    for a, b in zip(wide, tall, strict=True):
        torch.testing.assert_close(a, b.transpose(2, 3), rtol=1e-3, atol=1e-3)


def reference_maps(model: VPD, x: Tensor, sources: list[str]) -> dict[int, Tensor]:
    """Maps by hooking every attention layer, as the original does: {positions: mean over the layers}."""
    captured: dict[int, list[Tensor]] = {}
    unet = model.backbone.unet.unet.diffusion_model
    places = {"down": unet.input_blocks, "mid": unet.middle_block, "up": unet.output_blocks}
    handles = []
    for source in sources:
        place, kind = source.split("_")
        for name, module in places[place].named_modules():
            if isinstance(module, CrossAttention) and name.endswith({"cross": "attn2", "self": "attn1"}[kind]):

                def hook(layer: CrossAttention, args: tuple, output: object) -> None:
                    q, k = (layer._split_heads(f(a)) for f, a in ((layer.to_q, args[0]), (layer.to_k, args[-1])))
                    m = torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) * layer.scale, -1).mean(1)
                    captured.setdefault(m.shape[1], []).append(m)

                handles.append(module.register_forward_hook(hook))
    model.extract_feat(x)
    for handle in handles:
        handle.remove()
    return {n: torch.stack(layers).mean(0) for n, layers in captured.items()}


@pytest.mark.parametrize(
    ("selector", "max_attn_size", "levels"),
    [
        ("up_cross+down_cross", None, {1, 2}),
        ("up_cross+down_cross", 16, {0, 1, 2}),
        ("up_cross", 4, {2}),
        ("mid_cross", None, {3}),
        ("up_cross+mid_cross+down_cross", None, {1, 2, 3}),
        ("down_self", None, {1, 2}),
        ("mid_self+up_self", 4, {2, 3}),
    ],
)
@torch.inference_mode()
def test_selectors(make: Callable, selector: str, max_attn_size: int | None, levels: set[int]) -> None:
    model = make(attn_selector=selector, max_attn_size=max_attn_size)
    x = images()
    features = model.extract_feat(x)
    assert tuple(f.shape[1] for f in features) == model.config.feature_channels
    expected = reference_maps(model, x, selector.split("+"))
    found = {level for level, f in enumerate(features) if f.shape[1] > WIDTHS[level]}
    assert found == levels
    for level in levels:
        maps = features[level][:, WIDTHS[level] :]
        torch.testing.assert_close(maps.flatten(2).transpose(1, 2), expected[maps.shape[2] * maps.shape[3]])
    assert model(x).shape == (1, 3, 128, 128)


@torch.inference_mode()
def test_cross_and_self_maps_together(make: Callable) -> None:
    both = make(attn_selector="up_cross+up_self")
    x = images()
    feature = both.extract_feat(x)[2]
    assert feature.shape == (1, 64 + 3 + 16, 4, 4)
    for start, stop, kind in ((64, 67, "up_cross"), (67, 83, "up_self")):
        expected = reference_maps(both, x, [kind])[16]
        torch.testing.assert_close(feature[:, start:stop].flatten(2).transpose(1, 2), expected)
    assert both.split_maps([f for f in both.extract_feat(x)])[1][2].shape == (1, 3, 4, 4)
    with pytest.raises(InputError, match="self-attention maps fix the image size"):
        both(images(64, 64))


@torch.inference_mode()
def test_without_maps(make: Callable) -> None:
    model = make(use_attn=False)
    features = model.extract_feat(images())
    assert tuple(f.shape[1] for f in features) == WIDTHS
    assert model.split_maps(features)[1] == {}


def test_latent_scale(make: Callable) -> None:
    x = images()
    with torch.inference_mode():
        torch.testing.assert_close(make(latent_scale=0.18215).encode(x), make().encode(x) * 0.18215)


@pytest.mark.parametrize("map_grad", [False, True])
def test_map_gradients(make: Callable, map_grad: bool) -> None:
    model = make(map_grad=map_grad)
    _, maps = model.split_maps(model.extract_feat(images()))
    (maps[1] ** 2).sum().backward()
    key = model.unet.unet.diffusion_model.output_blocks[4][1].transformer_blocks[0].attn2.to_k.weight
    assert (key.grad.abs().max().item() > 0) is map_grad


@pytest.mark.parametrize("map_grad", [False, True])
def test_checkpointing_changes_no_gradient_and_computes_each_map_once(
    make: Callable, monkeypatch: pytest.MonkeyPatch, map_grad: bool
) -> None:
    x = images()
    asked = []
    forward = CrossAttention.forward

    def counting(self: CrossAttention, *args: object, map_sum: object) -> object:
        asked.append(map_sum is not None)
        return forward(self, *args, map_sum=map_sum)

    monkeypatch.setattr(CrossAttention, "forward", counting)
    gradients, calls = [], []
    for enabled in (False, True):
        model = make(map_grad=map_grad)
        model.gradient_checkpointing_enable(enabled)
        asked.clear()
        model(x).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        calls.append((len(asked), sum(asked)))
    assert calls[0] == (20, 6)  # 10 transformer blocks; three layers at each of two levels give maps
    assert calls[1] == (40, 6)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0, msg=name)


def test_the_encoder_is_frozen_unless_asked(make: Callable) -> None:
    x = images(64, 64)
    frozen, trained = make(), make(train_encoder=True)
    for model, expected in ((frozen, False), (trained, True)):
        model(x).mean().backward()
        weights = list(model.encoder_vq.encoder.parameters())
        assert all(w.requires_grad is expected for w in weights)
        assert all((w.grad is not None) is expected for w in weights)
    assert frozen.encode(x).requires_grad is False


def test_threads_do_not_share_maps(make: Callable) -> None:
    model = make()
    inputs = [images(64, 64 * (1 + i % 2)) for i in range(6)]
    with torch.inference_mode():
        expected = [model.extract_feat(x) for x in inputs]
    results = results_of_threads(torch.inference_mode()(model.extract_feat), inputs)
    for a, b in zip(results, expected, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y)


@torch.inference_mode()
def test_depth_sizes_and_scenes(make: Callable) -> None:
    model = make("depth")
    for height, width in ((64, 96), (96, 64), (128, 128)):
        depth = model(torch.rand(2, 3, height, width), torch.tensor([0, 3]))["pred_d"]
        assert depth.shape == (2, 1, height, width)
        assert depth.min() > 0
        assert depth.max() < model.config.max_depth
    mean = model.context(None, 2)
    by_hand = model.encoder.text_adapter(model.class_embeddings.mean(0), model.encoder.gamma)
    torch.testing.assert_close(mean, by_hand.expand(2, 1, -1))
    assert model(torch.rand(1, 3, 64, 64))["pred_d"].shape == (1, 1, 64, 64)


def test_the_batch_changes_nothing(make: Callable) -> None:
    model, x = make(), images(64, 64, batch=3)
    with torch.inference_mode():
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.inference_mode()
def test_other_dtypes(make: Callable, small_backbone: BackboneConfig, dtype: torch.dtype) -> None:
    model, x = make(backbone=small_backbone), images(64, 64)
    expected = model(x)
    actual = make(backbone=small_backbone).to(dtype)(x.to(dtype))
    assert actual.dtype == dtype
    tolerance = {torch.float64: 1e-4, torch.bfloat16: 0.1}[dtype]  # bf16 keeps 8 bits through some 300 layers
    assert (actual.double() - expected.double()).norm() <= tolerance * expected.double().norm()


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        ("segmentation", (torch.zeros(1, 3, 100, 128),), "multiples of 64, got 100x128"),
        ("segmentation", (torch.zeros(1, 3, 0, 64),), "multiples of 64, got 0x64"),
        ("segmentation", (torch.zeros(3, 64, 64),), r"shape \(B, 3, H, W\), got \(3, 64, 64\)"),
        ("segmentation", (torch.zeros(1, 4, 64, 64),), r"got \(1, 4, 64, 64\)"),
        ("segmentation", (torch.zeros(1, 3, 64, 64, dtype=torch.uint8),), "dtype torch.float32, got torch.uint8"),
        ("segmentation", ([[0.0]],), "torch.Tensor, got list"),
        ("referring", (torch.zeros(1, 3, 64, 64), torch.zeros(1, 4, 64)), r"tokens must have shape \(B, 5, 64\)"),
        ("referring", (torch.zeros(1, 3, 64, 64), torch.zeros(2, 5, 64)), "one row per image"),
        ("depth", (torch.zeros(1, 3, 64, 70),), "multiples of 32, got 64x70"),
        ("depth", (torch.zeros(1, 3, 64, 64), torch.tensor([4])), r"\[0, 4\), got \[4\]"),
        ("depth", (torch.zeros(1, 3, 64, 64), torch.tensor([-1])), r"got \[-1\]"),
        ("depth", (torch.zeros(1, 3, 64, 64), torch.tensor([1.0])), "int64"),
        ("depth", (torch.zeros(2, 3, 64, 64), torch.tensor([1])), "one row per image"),
    ],
)
def test_bad_input(make: Callable, task: str, arguments: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(task)(*arguments)


def test_random_weights_depend_on_the_seed_only(make: Callable) -> None:
    a, b, c = (make(seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["class_embeddings"], c["class_embeddings"])
    assert a["class_embeddings"].std() == pytest.approx(1, abs=0.2)


def test_gradient_checkpointing_by_level(tiny_backbone):
    """What backward keeps shrinks level by level, and the gradients stay."""
    model = randomize(VPD.empty(VPDConfig(num_classes=5, channels=32, base_size=128, backbone=tiny_backbone)), 2).eval()
    images = torch.randn(1, 3, 128, 128).clamp(-1, 1)

    def run(levels: bool | tuple[int, ...]) -> tuple[int, torch.Tensor]:
        model.gradient_checkpointing_enable(levels)
        model.zero_grad()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept.update({storage.data_ptr(): storage.nbytes()} if storage.data_ptr() not in weights else {})
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(images).square().mean()
        loss.backward()
        return sum(kept.values()), model.unet.unet.diffusion_model.input_blocks[1][0].in_layers[2].weight.grad.clone()

    (everything, gradient), *others = [run(levels) for levels in (False, (2, 3), (0,), (0, 1), True)]
    sizes = [size for size, _ in others]
    assert everything > sizes[0] > sizes[1] > sizes[2] > sizes[3]
    for _, other in others:
        torch.testing.assert_close(other, gradient)
    with pytest.raises(InputError, match="levels must be 0 to 3, got 4"):
        model.gradient_checkpointing_enable([0, 4])
