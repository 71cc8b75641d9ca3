"""One of two processes that train an accelerated model of the original's structure in DistributedDataParallel."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import distributed, nn

import vpd_fast
from tests.helpers.backbones import TINY
from tests.interop.original_models import VPDSeg
from vpd_fast import VPDConfig


class Loss(nn.Module):
    """The model's loss as a forward, which is what DistributedDataParallel wraps."""

    def __init__(self, model: VPDSeg) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return a loss of each image's logits, a mean over images."""
        return self.model.forward_dummy(images).square().mean()


def model() -> VPDSeg:
    """Return the same accelerated model wherever it is called; batch norm does not look at other images."""
    torch.manual_seed(0)
    found = VPDSeg(VPDConfig(num_classes=3, channels=32, base_size=64, backbone=TINY))
    nn.init.normal_(found.class_embeddings)
    return vpd_fast.accelerate(found.eval())


def images() -> torch.Tensor:
    """Return two images (2,3,64,64)."""
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def main(out: Path) -> None:
    """Take one step of SGD with an image of its own, and save the gradients and the weights."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    # The original recomputes its transformer blocks in nested backward passes, which only a static graph allows.
    wrapped = nn.parallel.DistributedDataParallel(Loss(model()), static_graph=True)
    optimizer = torch.optim.SGD(wrapped.parameters(), 1e-3)
    wrapped(images()[rank : rank + 1]).backward()
    gradients = {name: p.grad.clone() for name, p in wrapped.module.named_parameters() if p.grad is not None}
    optimizer.step()
    torch.save({"gradients": gradients, "state": wrapped.module.state_dict()}, out / f"{rank}.pt")
