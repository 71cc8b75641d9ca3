"""What maps cost while diffusers generates: plain generation, `collect_maps`, and stored probabilities.

`python benchmarks/diffusers_maps.py [--size 256] [--steps 2] [--rounds 3] [--model sd|sdxl] [--device cpu]` runs the
UNet of Stable Diffusion with random weights under classifier-free guidance and prints, for each way, the median of
seconds per step, as a multiple of plain generation, and the peak memory of a process of its own. Rounds of the three
ways alternate.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from vpd_fast.bench.timing import table
from vpd_fast.interop.diffusers import collect_maps

MODELS: dict[str, dict[str, Any]] = {
    "sd": {"cross_attention_dim": 768},
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
    },
}
WAYS = ("plain", "collect_maps", "stored")


class Stored(AttnProcessor2_0):
    """Keeps the probabilities of every call, averaged over heads, as attention-map tools do."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[torch.Tensor] = []

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, **kwargs: Any) -> Any:
        """Attention, after its probabilities."""
        q = attn.head_to_batch_dim(attn.to_q(hidden_states))
        k = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        probabilities = attn.get_attention_scores(q, k).unflatten(0, (-1, attn.heads)).mean(1)
        self.kept.append(probabilities.chunk(2)[1])
        return super().__call__(attn, hidden_states, encoder_hidden_states, **kwargs)


def run(way: str, unet: Any, inputs: tuple[torch.Tensor, ...], steps: int) -> float:
    """Return seconds per step."""
    if way == "stored":
        plain = dict(unet.attn_processors)
        stored = Stored()
        unet.set_attn_processor({name: stored if "attn2" in name else old for name, old in plain.items()})
    with collect_maps(unet, guided=True) if way == "collect_maps" else nullcontext(), torch.no_grad():
        start = time.perf_counter()
        for step in range(steps):
            unet(inputs[0], step, inputs[1])
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / steps
    if way == "stored":
        unet.set_attn_processor(plain)
    return seconds


def make(model: str, size: int, device: str) -> tuple[Any, tuple[torch.Tensor, ...]]:
    """Return a UNet with random weights and a guided batch of one image."""
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**MODELS[model]).eval()
        inputs = torch.randn(2, 4, size // 8, size // 8), torch.randn(2, 77, MODELS[model]["cross_attention_dim"])
    return unet, inputs


def peak(unet: Any) -> float:
    """Return the largest memory that this process, or its GPU, has had, in GiB."""
    if next(unet.parameters()).is_cuda:
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="sd")
    parser.add_argument("--size", type=int, default=256, help="height and width of the image")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)  # a process of its own, for memory
    options = parser.parse_args()
    unet, inputs = make(options.model, options.size, options.device)
    if options.only:
        run(options.only, unet, inputs, options.steps)
        print(json.dumps(peak(unet)))
        return
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(1 + options.rounds):  # the first warms up
        for way in WAYS:
            seconds[way].append(run(way, unet, inputs, options.steps))
    del unet
    medians = {way: statistics.median(times[1:]) for way, times in seconds.items()}
    rows = []
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", way]
        memory = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        ratio = f"{medians[way] / medians['plain']:.2f}"
        rows.append({"way": way, "s/step": f"{medians[way]:.3f}", "of plain": ratio, "peak GiB": f"{memory:.2f}"})
    print(table(rows))


if __name__ == "__main__":
    main()
