"""Maps collected while diffusers generates, against those of a processor that keeps every layer's probabilities."""

import re

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.nn.functional import interpolate
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.helpers.alone import ROOT
from vpd_fast.bundled import asset
from vpd_fast.errors import InputError
from vpd_fast.interop.diffusers import GenerationMaps, collect_maps

PROMPT = "a red circle left of a blue square"
SIZE = (32, 48)
CALL = {"num_inference_steps": 2, "height": SIZE[0], "width": SIZE[1], "output_type": "np"}
WIDTH = 32


class _Quick(StableDiffusionPipeline):
    """Generates small images in two steps, if nothing else is asked for."""

    def __call__(self, prompt, **options):
        return super().__call__(prompt, **CALL | options)


def _text(kind):
    config = CLIPTextConfig(
        vocab_size=800,
        hidden_size=WIDTH,
        intermediate_size=37,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_act="gelu",
    )
    return kind(config).eval()


def _unet(**options):
    defaults = {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "sample_size": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
    }
    return UNet2DConditionModel(**defaults | options).eval()


def _parts():
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = AutoencoderKL(block_out_channels=[8, 8, 8, 8], norm_num_groups=4, latent_channels=4, **blocks).eval()
    tokenizer = CLIPTokenizer.from_pretrained(asset("shapes-text") / "tokenizer", model_max_length=77)
    return {"vae": vae, "tokenizer": tokenizer, "scheduler": DDIMScheduler()}


@pytest.fixture(scope="module")
def sd():
    unet = _unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")
    )
    rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = _Quick(unet=unet, text_encoder=_text(CLIPTextModel), **_parts(), **rest)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def sdxl():
    unet = _unet(
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        cross_attention_dim=2 * WIDTH,
    )
    parts = _parts()
    texts = {"text_encoder": _text(CLIPTextModel), "text_encoder_2": _text(CLIPTextModelWithProjection)}
    pipeline = StableDiffusionXLPipeline(unet=unet, tokenizer_2=parts["tokenizer"], **texts, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class _KeepAll(AttnProcessor2_0):
    """Also keeps the probabilities of each call, averaged over heads: (B, N, L)."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        q = attn.head_to_batch_dim(attn.to_q(hidden_states))
        k = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        probabilities = (attn.scale * q @ k.transpose(1, 2)).softmax(-1)
        self.kept.append(probabilities.view(-1, attn.heads, *probabilities.shape[1:]).mean(1))
        return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)


def _generate(pipeline, prompt, **options):
    generator = torch.Generator().manual_seed(1)
    return pipeline(prompt, generator=generator, **{**CALL, **options}).images


def _eager(pipeline, prompt, guided=True, **options):
    """Images, and maps (B, L, H, W) of the image's size from stored probabilities."""
    processor = _KeepAll()
    cross = [m for m in pipeline.unet.modules() if getattr(m, "is_cross_attention", False)]
    old = [module.processor for module in cross]
    for module in cross:
        module.set_processor(processor)
    try:
        images = _generate(pipeline, prompt, **options)
    finally:
        for module, its_own in zip(cross, old, strict=True):
            module.set_processor(its_own)
    total = 0
    for kept in processor.kept:
        half = kept[len(kept) // 2 :] if guided else kept
        scale = round((SIZE[0] * SIZE[1] / half.shape[1]) ** 0.5)
        maps = half.transpose(1, 2).unflatten(2, (SIZE[0] // scale, SIZE[1] // scale))
        total = total + interpolate(maps, SIZE, mode="bilinear")
    return images, total / len(processor.kept)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_maps_and_images_of_stable_diffusion(sd, scheduler):
    sd.scheduler = scheduler.from_config(sd.scheduler.config)
    images, expected = _eager(sd, PROMPT)
    with collect_maps(sd) as maps:
        ours = _generate(sd, PROMPT)
    assert np.abs(ours - images).max() < 1e-5
    assert len(maps) == 1
    assert maps.unet_calls == len(sd.scheduler.timesteps)
    _compare(maps, expected)


def _compare(maps, expected):
    for image, of_image in zip(maps, expected, strict=True):
        got = np.stack([image[i] for i in range(len(image))])
        assert got.shape == tuple(of_image.shape)
        assert np.abs(got - of_image.numpy()).max() < 1e-6
        assert np.abs(got.sum(0) - 1).max() < 1e-5


def test_maps_of_stable_diffusion_xl_of_several_prompts(sdxl):
    prompts = [PROMPT, "a green triangle"]
    images, expected = _eager(sdxl, prompts, num_images_per_prompt=2)
    with collect_maps(sdxl, words=["green triangle", "square"]) as maps:
        ours = _generate(sdxl, prompts, num_images_per_prompt=2)
    assert np.abs(ours - images).max() < 1e-5
    _compare(maps, expected)
    assert [image.words for image in maps] == [("square",)] * 2 + [("green triangle",)] * 2
    assert "".join(maps[2].names[1:8]) == "agreentriangle"
    triangle = expected[2, 2:8].mean(0).numpy()  # after the start of the text and "a"
    assert np.abs(maps[2]["green triangle"] - triangle).max() < 1e-6


def test_without_guidance_the_whole_batch_counts(sd):
    _, expected = _eager(sd, PROMPT, guided=False, guidance_scale=1.0)
    with collect_maps(sd) as maps:
        _generate(sd, PROMPT, guidance_scale=1.0)
    _compare(maps, expected)


def test_a_word_that_stands_twice_and_a_second_generation(sd):
    with collect_maps(sd, words=["a"]) as maps:
        _generate(sd, "a blue square")
        _generate(sd, PROMPT)
        assert maps.unet_calls == CALL["num_inference_steps"]
    first = maps[0].channels("a")
    assert [maps[0].names[i] for i in first] == ["a", "a (2)"]


def test_memory_does_not_grow_with_steps(sd):
    with collect_maps(sd) as maps:
        sizes = []
        for steps in (1, 4):
            _generate(sd, PROMPT, num_inference_steps=steps)
            sizes.append({size: sums.numel() for size, sums in maps._sums.items()})
    assert sizes[0] == sizes[1]
    assert len(sizes[0]) == 2  # levels


def test_the_example_of_the_page(sd, tmp_path, monkeypatch):
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "interop.md").read_text(), re.DOTALL)
    (example,) = (example for example in examples if "collect_maps" in example)
    monkeypatch.chdir(tmp_path)
    found = {"pipeline": sd}
    exec(example, found)  # noqa: S102
    assert found["heat"].shape == SIZE
    assert (tmp_path / "heat" / "maps_0.png").is_file()


def test_pictures(sd, tmp_path):
    with collect_maps(sd, words=["circle"]) as maps:
        images = _generate(sd, PROMPT)
    (path,) = maps.save(tmp_path / "heat", images)
    assert path.name == "maps_0.png"
    with pytest.raises(InputError, match="maps of 1 images, got 2"):
        maps.save(tmp_path, [images[0]] * 2)


def test_a_bare_unet(sd):
    latents, context = torch.randn(2, 4, 4, 6), torch.randn(2, 5, WIDTH)
    with collect_maps(sd.unet) as maps, torch.no_grad():
        sd.unet(latents, 3, context)
        assert (len(maps), len(maps[0]), maps[0][0].shape) == (2, 5, SIZE)
        with pytest.raises(InputError, match="2 images and 5 tokens are collected"):
            sd.unet(latents[:1], 3, context[:1])
        maps.reset()
        sd.unet(latents[:1], 3, context[:1])
        assert len(maps) == 1
        with pytest.raises(IndexError, match="asked for number 1"):
            maps[1]
        with pytest.raises(InputError, match="attention mask"):
            sd.unet(latents, 3, context, encoder_attention_mask=torch.ones(2, 5, dtype=torch.bool))


def test_the_model_is_left_as_it_was(sd):
    before = dict(sd.unet.attn_processors)
    unknown = pytest.raises(InputError, match="no prompt has 'dog'; the words are a, blue, circle")
    with unknown, collect_maps(sd, words=["circle", "dog"]):
        _generate(sd, PROMPT)
    assert sd.unet.attn_processors == before
    assert "encode_prompt" not in vars(sd)
    assert not sd.unet._forward_pre_hooks


def test_what_cannot_be_collected(sd):
    with pytest.raises(InputError, match="Linear has no cross-attention"), collect_maps(torch.nn.Linear(2, 2)):
        pass
    with pytest.raises(InputError, match="words need a pipeline"), collect_maps(sd.unet, words=["dog"]):
        pass
    with pytest.raises(InputError, match="must be a list of words"), collect_maps(sd, words="dog"):
        pass
    with collect_maps(sd), pytest.raises(InputError, match="already"), collect_maps(sd):
        pass
    before = dict(sd.unet.attn_processors)
    sd.unet.set_attn_processor(_KeepAll())
    with pytest.raises(InputError, match="has the processor _KeepAll"), collect_maps(sd):
        pass
    sd.unet.set_attn_processor(before)
    odd = pytest.raises(InputError, match="two halves, got one of 1")
    with odd, collect_maps(sd.unet, guided=True), torch.no_grad():
        sd.unet(torch.randn(1, 4, 4, 6), 3, torch.randn(1, 5, WIDTH))
    assert len(GenerationMaps()) == 0
