"""`accelerate` and `restore` on models of the original's structure, with the weights of the golden cases."""

import copy
import re

import pytest
import torch
from torch import nn

import vpd_fast
from tests.golden.case import GoldenCase
from tests.helpers import processes
from tests.helpers.alone import ROOT
from tests.helpers.backbones import TINY
from tests.interop import ddp_process
from tests.interop.original_models import AutoencoderKL, DiffusionWrapper, UNetModel, UNetWrapper, VPDSeg, original
from vpd_fast import VPD, VPDConfig
from vpd_fast.errors import InputError
from vpd_fast.interop._replacements import RECORD

CASES = ("seg_small", "seg_small_a64", "refer_small", "depth_small")


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return GoldenCase(request.param)


@pytest.fixture(scope="module")
def model(case):
    return original(case)


@pytest.fixture
def tiny():
    """A segmentation model of the least size for 128x128."""
    torch.manual_seed(0)
    config = VPDConfig(num_classes=3, channels=32, base_size=128, backbone=TINY)
    model = VPDSeg(config)
    nn.init.normal_(model.class_embeddings)
    return model.eval()


@pytest.fixture
def accelerated(model):
    """Accelerates the model until the test ends."""

    def make(precision=None):
        assert vpd_fast.accelerate(model, precision) is model
        return model

    yield make
    if RECORD in vars(model):
        vpd_fast.restore(model)


def _inputs(case):
    """One image, which is small for depth's head, whose channels are those of the full-size model."""
    images, *rest = (argument[:1] for argument in case.inputs())
    return (images[..., :96, :96], *rest) if case.settings["task"] == "depth" else (images, *rest)


def _call(model, case):
    inputs = _inputs(case)
    out = model.forward_dummy(*inputs) if case.settings["task"] == "segmentation" else model(*inputs)
    return out["pred_d"] if isinstance(out, dict) else out


def _outputs(model, case):
    """Features and prediction."""
    features = []
    wrapper = getattr(model, "encoder", model).unet
    keep = wrapper.register_forward_hook(lambda _module, _args, out: features.extend(out))
    with torch.no_grad():
        out = _call(model, case)
    keep.remove()
    return [*features, out]


@pytest.fixture(scope="module")
def before(model, case):
    return _outputs(model, case)


def _distance(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def test_the_stand_in_is_the_original(before, case):
    """Otherwise the rest would say nothing; what the plain model computes is compared with the original elsewhere."""
    with torch.no_grad():
        expected = case.model()(*_inputs(case))
    assert _distance(before[-1], expected["pred_d"] if isinstance(expected, dict) else expected) < 1e-5


@pytest.mark.parametrize("precision", [None, "fp32"])
def test_numbers_stay(accelerated, before, case, precision):
    for got, expected in zip(_outputs(accelerated(precision), case), before, strict=True):
        assert got.dtype == expected.dtype
        assert _distance(got, expected) < 1e-5


def test_training_stays_what_it_was(case):
    model = original(case)
    is_depth = case.settings["task"] == "depth"
    if is_depth:  # its gradients are small sums that cancel, which in float32 are rounding; and its head is large
        model.double()
    keys, parameters = list(model.state_dict()), list(model.parameters())

    def gradients():
        model.zero_grad()
        model.train()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.Dropout2d):
                module.eval()
        if is_depth:
            out = model.encoder(case.inputs()[0][:, :, :128, :128].double(), torch.tensor([3]))
        else:
            out = _call(model, case)
        out.square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    before = gradients()
    vpd_fast.accelerate(model)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    after = gradients()
    largest = max(g.norm() for g in before.values() if g is not None)
    for name, expected in before.items():
        assert (after[name] is None) == (expected is None), name
        if expected is not None:
            assert (after[name] - expected).norm() <= 1e-4 * expected.norm() + 1e-6 * largest, name


def test_two_processes_train_one_accelerated_model(tmp_path):
    """In DistributedDataParallel gradients are the mean of those of each image alone, and weights stay equal."""
    processes.run_together(ddp_process.main, [(tmp_path,)] * 2, tmp_path / "log", 200)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(value, second["state"][name]) for name, value in first["state"].items())
    single = ddp_process.Loss(ddp_process.model())
    assert any(not torch.equal(value, first["state"][name]) for name, value in single.state_dict().items())
    for image in ddp_process.images().split(1):
        (single(image) / 2).backward()
    expected = {name: p.grad for name, p in single.named_parameters() if p.grad is not None}
    largest = max(gradient.norm() for gradient in expected.values())
    assert first["gradients"].keys() >= expected.keys()
    for name, gradient in expected.items():
        got = first["gradients"][name]
        assert torch.equal(got, second["gradients"][name])
        assert (got - gradient).norm() <= 1e-5 * gradient.norm() + 1e-6 * largest, name


def test_the_calls_of_segmentation():
    model = original(GoldenCase("seg_small"))
    image = GoldenCase("seg_small").input("slide", (1, 3, 128, 171))
    metas = [{"ori_shape": (96, 129, 3), "flip": False}]
    flipped = [{**metas[0], "flip": True}]

    def calls():
        with torch.no_grad():
            crop = image[..., :128]
            return (
                *model.extract_feat(crop),
                model.encode_decode(crop, metas),
                model.slide_inference(image, metas, True),
                torch.from_numpy(model.aug_test([image, image.flip(3)], [metas, flipped])[0]),
            )

    before = calls()
    vpd_fast.accelerate(model, "fp32")
    for got, expected in zip(calls(), before, strict=True):
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        if got.is_floating_point():
            assert _distance(got, expected) < 1e-5
        else:
            assert (got == expected).float().mean() > 0.999


def test_eight_bits_are_those_of_optimize(tiny):
    config = VPDConfig(num_classes=3, channels=32, base_size=128, backbone=TINY)
    plain = VPD(config).eval()
    plain.load_state_dict(tiny.state_dict())
    image = torch.rand(2, 3, 128, 128) * 2 - 1
    expected = vpd_fast.optimize(plain, "int8").extract_feat(image)
    vpd_fast.accelerate(tiny, "int8")
    with torch.no_grad():
        for a, b in zip(tiny.extract_feat(image), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_example_of_the_page(tiny):
    example = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "interop.md").read_text(), re.DOTALL)[0]
    names = {"model": tiny, "images": torch.rand(1, 3, 128, 128)}
    with torch.no_grad():
        exec(example, names)  # noqa: S102
    assert names["logits"].shape == (1, 3, 128, 128)


def _state(model):
    """Everything that an instance's modules hold, but for what a module computes when it is asked to."""
    return [
        (id(m), {k: v for k, v in vars(m).items() if k not in ("_modules", "_parameters", "_buffers")})
        for m in model.modules()
    ]


@pytest.mark.parametrize("precision", [None, "fp32"])
def test_restore_gives_back_the_instance(tiny, precision):
    before, store = _state(tiny), dict(vars(tiny.unet.attention_store))
    vpd_fast.accelerate(tiny, precision)
    assert dict(vars(tiny.unet.attention_store)) == store
    assert _state(tiny) != before
    assert vpd_fast.restore(tiny) is tiny
    assert _state(tiny) == before
    with pytest.raises(InputError, match="VPDSeg is not accelerated"):
        vpd_fast.restore(tiny)


def test_maps_arrive_where_they_did(tiny):
    """The store holds the same maps of cross-attention, detached; those of self-attention, which nobody reads, not."""
    image = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        tiny.forward_dummy(image)
        before = tiny.unet.attention_store.step_store
        vpd_fast.accelerate(tiny)
        tiny.forward_dummy(image)
    after = tiny.unet.attention_store.step_store
    for key, maps in before.items():
        if key.endswith("cross"):
            assert all(_distance(a, b) < 1e-5 for a, b in zip(after[key], maps, strict=True))
        else:
            assert after[key] == []
    tiny.forward_dummy(image).sum().backward()
    assert not any(maps.requires_grad for maps in tiny.unet.attention_store.step_store["up_cross"])
    assert len(tiny.unet.attention_store.step_store["up_cross"]) == len(before["up_cross"])  # backward adds none


def test_gradients_through_maps_without_checkpointing(tiny):
    for module in tiny.modules():
        if hasattr(module, "checkpoint"):
            module.checkpoint = False
    image, keys = (
        torch.rand(1, 3, 128, 128),
        "unet.unet.diffusion_model.output_blocks.3.1.transformer_blocks.0.attn2.to_k.weight",
    )

    def gradient():
        tiny.zero_grad()
        sum(maps.square().sum() for maps in tiny.extract_feat(image)[1:3]).backward()
        return tiny.get_parameter(keys).grad

    before = gradient()
    vpd_fast.accelerate(tiny)
    assert _distance(gradient(), before) < 1e-4


@pytest.mark.parametrize("precision", [None, "fp32"])
def test_the_backbone_alone(precision):
    torch.manual_seed(0)
    wrapper = UNetWrapper(DiffusionWrapper(UNetModel(TINY)), base_size=128, attn_selector="up_cross").eval()
    autoencoder = AutoencoderKL(TINY).eval()
    latents, context, image = torch.randn(1, 4, 16, 16), torch.randn(1, 5, TINY.context_dim), torch.rand(1, 3, 64, 64)
    t = torch.ones(1, dtype=torch.long)
    with torch.no_grad():
        features, mean = wrapper(latents, t, c_crossattn=[context]), autoencoder.encode(image).mode()
        vpd_fast.accelerate(wrapper, precision)
        vpd_fast.accelerate(autoencoder, precision)
        for got, expected in zip(wrapper(latents, t, c_crossattn=[context]), features, strict=True):
            assert _distance(got, expected) < 1e-5
        assert _distance(autoencoder.encode(image).mode(), mean) < 1e-5
        if precision:
            with pytest.raises(InputError, match="which is for t = 1, got"):
                wrapper(latents, 2 * t, c_crossattn=[context])
            with pytest.raises(InputError, match="no variance"):
                autoencoder.encode(image).sample()


def test_another_time_step_and_maps_of_self_attention(tiny):
    """What successors change beside VPD's own settings stays as it is, without a precision."""
    tiny.unet.attn_selector = ["up_self"]
    latents, context = torch.randn(1, 4, 16, 16), torch.randn(1, 3, TINY.context_dim)
    arguments = latents, torch.tensor([500])
    with torch.no_grad():
        before = tiny.unet(*arguments, c_crossattn=[context])
        vpd_fast.accelerate(tiny)
        after = tiny.unet(*arguments, c_crossattn=[context])
    assert all(_distance(a, b) < 1e-5 for a, b in zip(after, before, strict=True))


def _refused(model, match, precision=None):
    before = _state(model)
    with pytest.raises(InputError, match=match):
        vpd_fast.accelerate(model, precision)
    assert _state(model) == before


def test_other_models(tiny):
    _refused(nn.Linear(2, 2), "expected a VPDSeg, VPDRefer or VPDDepth of the original code.*got Linear")
    _refused(nn.Sequential(tiny, copy.deepcopy(tiny)), "has 2 UNets and 2 KL encoders")
    with pytest.raises(InputError, match=r"VPDSegmentation is one of vpd_fast: use vpd_fast.optimize"):
        vpd_fast.accelerate(VPD.empty(VPDConfig(backbone=TINY)))
    with pytest.raises(InputError, match="got str"):
        vpd_fast.accelerate("vpd_seg.ckpt")
    _refused(copy.deepcopy(tiny).to("meta"), "has parameters on the meta device: load its weights")


@pytest.mark.parametrize("precision", [None, "fp32"])
def test_a_model_that_is_accelerated_already(tiny, precision):
    vpd_fast.accelerate(tiny.unet)
    with pytest.raises(InputError, match="VPDSeg.unet is accelerated already"):
        vpd_fast.accelerate(tiny, precision)
    vpd_fast.restore(tiny.unet)


@pytest.mark.parametrize("precision", [None, "fp32"])
def test_changed_hooks(tiny, precision):
    attention = tiny.unet.unet.diffusion_model.output_blocks[4][1].transformer_blocks[0].attn2
    attention.forward = lambda x, context=None, mask=None: x
    _refused(tiny, r"output_blocks.4.1.transformer_blocks.0.attn2.forward is <function.*not the hook", precision)


def test_a_hook_replaced_since(tiny):
    vpd_fast.accelerate(tiny)
    attention = tiny.unet.unet.diffusion_model.output_blocks[4][1].transformer_blocks[0].attn2
    ours, attention.forward = attention.forward, lambda x, context=None, mask=None: x
    with pytest.raises(InputError, match="attn2.forward was replaced after vpd_fast.accelerate"):
        vpd_fast.restore(tiny)
    attention.forward = ours
    vpd_fast.restore(tiny)


def test_modules_that_compute_something_else(tiny):
    """The same parameters, other arithmetic: each is tried out."""
    attention = tiny.unet.unet.diffusion_model.middle_block[1].transformer_blocks[0].attn1
    scale, attention.scale = attention.scale, "wide"
    _refused(tiny, "middle_block.1.transformer_blocks.0.attn1 cannot be tried out")
    attention.scale = scale
    block = tiny.encoder_vq.encoder.mid.block_1
    block.forward = lambda x, temb: x.relu()
    _refused(tiny, "mid.block_1 computes something else than expected")
    _refused(tiny, "AutoencoderKL|encoder_vq computes something else", "fp32")


def test_precisions(tiny):
    _refused(tiny, "precision must be one of", "int3")
    _refused(tiny.train(), "in training mode: call eval", "fp32")
    vpd_fast.accelerate(tiny.eval(), "fp32")
    with pytest.raises(InputError, match="accelerated for inference, and this is training: call vpd_fast.restore"):
        tiny.train().extract_feat(torch.rand(1, 3, 128, 128))


def test_what_a_precision_does_not_cover(tiny):
    """The settings of successors, which the engine does not have."""
    for selector in (["mid_cross", "up_cross"], ["up_cross-up_self"]):
        tiny.unet.attn_selector = selector
        _refused(tiny, r"unet selects \[.*precision=None accelerates it exactly", "fp32")
    tiny.unet.attn_selector = ["up_cross"]
    forward = tiny.unet.forward
    tiny.unet.forward = lambda *a, **k: [x.flip(1) for x in forward(*a, **k)]
    _refused(tiny, r"unet computes something else than VPD's \(cosine", "fp32")
    tiny.unet.forward = lambda *a, **k: forward(*a, **k)[:3]
    _refused(tiny, r"unet returns features of .*precision=None", "fp32")
