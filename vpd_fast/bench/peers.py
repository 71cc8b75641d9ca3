"""Other libraries on the same encoder and UNet, with the same weights, in the fastest form they offer on a CPU.

They stop at the UNet's last feature map: no attention maps, no head. None is needed to run anything else.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpd_fast.bench.parity import Outputs, make_images
from vpd_fast.bench.timing import Stopwatch
from vpd_fast.bench.variants import Case, Source, Variant, conditioning
from vpd_fast.models.attention import CrossAttention
from vpd_fast.models.autoencoder import AttnBlock

if TYPE_CHECKING:
    from vpd_fast.models import VPD

INT8_IMAGES = 4  # that OpenVINO's quantisation sees


def why_missing(*packages: str, extra: str) -> str | None:
    """How to install what is missing, or None."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed: pip install 'vpd_fast[{extra}]'" if missing else None


def why_no_compile() -> str | None:
    """Why torch.compile of diffusers cannot run here, or None."""
    if sys.platform != "linux" or not (shutil.which("g++") or shutil.which("clang++")):
        return "torch.compile needs a C++ compiler: install g++"
    return why_missing("diffusers", extra="diffusers")


class BackboneVariant:
    """Encoder and UNet as two functions: images -> latents, and latents, context -> features.

    context: (1,L,context_dim), the same for all images. functions: what makes them for a case.
    """

    def __init__(self, context: Tensor, functions: Callable[[Case], tuple[Callable, Callable]]) -> None:
        self._context, self._functions = context, functions

    def prepare(self, case: Case) -> None:
        """Get ready for images of this case."""
        self._images = make_images(case.batch, case.size)
        self._batch_context = self._context.expand(case.batch, -1, -1)
        self._encode, self._unet = self._functions(case)

    def run(self) -> tuple[dict[str, float], Outputs]:
        """One pass of encoder and UNet."""
        watch = Stopwatch()
        with torch.no_grad():
            latents = self._encode(self._images)
            watch.lap("encoder")
            features = self._unet(latents, self._batch_context)
            watch.lap("unet")
        return watch.seconds, Outputs(latents, features)


def _context(model: VPD) -> Tensor:
    """The text that `ModelVariant` gives every image."""
    return model.context(*conditioning(model.config, 1))


@torch.no_grad()
def make_diffusers(source: Source, dtype: torch.dtype, compiled: bool = False) -> Variant:
    """diffusers' AutoencoderKL encoder and UNet2DConditionModel, in channels-last if that is faster, or compiled."""
    from vpd_fast.checkpoints.convert import unet_config, vae_config
    from vpd_fast.checkpoints.ldm_diffusers import Layout, unet_to_diffusers, vae_to_diffusers

    diffusers, model = importlib.import_module("diffusers"), source.load()
    backbone, layout = model.config.backbone, Layout.of_config(model.config.backbone)
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(unet_config(backbone))
        vae = diffusers.AutoencoderKL.from_config(vae_config(backbone))
    # VPD never runs the UNet's output layers; without them the result is its last feature map.
    unet.conv_norm_out = unet.conv_act = unet.conv_out = nn.Identity()
    vae.decoder = vae.post_quant_conv = nn.Identity()
    unet.load_state_dict(unet_to_diffusers(model.backbone.unet.unet.diffusion_model.state_dict(), layout), assign=True)
    weights = vae_to_diffusers(model.backbone.encoder_vq.state_dict(), layout)
    vae.load_state_dict({k: v for k, v in weights.items() if not k.startswith("post_quant_conv")}, assign=True)
    context, scale = _context(model).to(dtype), model.config.latent_scale
    del model, weights
    memory_format = torch.contiguous_format if dtype == torch.float32 else torch.channels_last
    unet, vae = (m.eval().to(dtype=dtype, memory_format=memory_format) for m in (unet, vae))

    def encode(images: Tensor) -> Tensor:
        moments = vae.quant_conv(vae.encoder(images.to(dtype=dtype, memory_format=memory_format)))
        return moments.chunk(2, dim=1)[0] * scale

    def features(latents: Tensor, text: Tensor) -> list[Tensor]:
        return [unet(latents, 1, encoder_hidden_states=text, return_dict=False)[0]]

    def functions(_: Case) -> tuple[Callable, Callable]:
        return (torch.compile(encode), torch.compile(features)) if compiled else (encode, features)

    return BackboneVariant(context, functions)


class _Encoder(nn.Module):
    """Images -> latents, as a module that can be traced."""

    def __init__(self, model: VPD) -> None:
        super().__init__()
        self.encoder, self.scale = model.backbone.encoder_vq, model.config.latent_scale

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder.encode(images) * self.scale


class _UNet(nn.Module):
    """Latents -> last feature map; a constant text, so that all that follows from it can be computed beforehand."""

    def __init__(self, model: VPD, batch: int) -> None:
        super().__init__()
        self.unet = model.backbone.unet
        self.unet.map_weights = {}
        self.register_buffer("context", _context(model).expand(batch, -1, -1).contiguous())

    def forward(self, latents: Tensor) -> Tensor:
        return self.unet(latents, self.context)[0]


def _fused_attention(self: CrossAttention, q: Tensor, k: Tensor, v: Tensor, _: Any) -> tuple[Tensor, None]:
    q, k, v = (self._split_heads(t) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2), None


def make_openvino(source: Source, precision: str) -> Variant:
    """OpenVINO's CPU plugin on our plain modules without maps; INT8 by NNCF's quantisation after training."""
    cast("dict[str, Any]", sys.modules)["openvino_telemetry"] = None  # its processes would compute while others do
    openvino, model = importlib.import_module("openvino"), source.load()
    context = _context(model).detach()
    for module in model.modules():  # the operation that OpenVINO has a kernel for
        if isinstance(module, CrossAttention):
            module._plain = MethodType(_fused_attention, module)
        elif isinstance(module, AttnBlock):
            module.attention_backend = "sdpa"
    core = openvino.Core()
    reduced = precision != "fp32" and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if reduced else "f32",
        "INFERENCE_NUM_THREADS": source.threads,
        "PERFORMANCE_HINT": "LATENCY",
    }

    def network(module: nn.Module, inputs: Tensor, examples: Callable[[], list[Tensor]]) -> Any:
        with torch.no_grad():
            graph = openvino.convert_model(module.eval(), example_input=inputs, input=[tuple(inputs.shape)])
        if precision == "int8":
            nncf = importlib.import_module("nncf")
            data = nncf.Dataset(examples(), lambda x: x.numpy())
            graph = nncf.quantize(graph, data, subset_size=INT8_IMAGES, model_type=nncf.ModelType.TRANSFORMER)
        compiled = core.compile_model(graph, "CPU", settings)
        return lambda x: torch.from_numpy(compiled(x.numpy())[0])

    def functions(case: Case) -> tuple[Callable, Callable]:
        images = [make_images(case.batch, case.size).roll(32 * i, dims=3) for i in range(INT8_IMAGES)]
        plain = _Encoder(model)
        encode = network(plain, images[0], lambda: images)

        @torch.no_grad()
        def latents() -> list[Tensor]:
            return [plain(x) for x in images]

        unet = network(_UNet(model, case.batch), encode(images[0]), latents)
        return encode, lambda x, _: [unet(x)]

    return BackboneVariant(context, functions)
