"""What the engines have in common: layers, and the memory, CUDA graphs and texts that calls of them share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vpd_fast.config import SIZE_MULTIPLE
from vpd_fast.engine.blocks import to_nchw, to_nhwc
from vpd_fast.engine.build import LayerInfo
from vpd_fast.engine.cpu_graphs import CpuGraphCache
from vpd_fast.engine.encoder import encode
from vpd_fast.engine.graphs import GraphCache
from vpd_fast.engine.layers import Layers
from vpd_fast.engine.text import TextMemo
from vpd_fast.engine.workspace import WorkspacePool
from vpd_fast.models import checks


class Engine:
    """Layers that several threads may call at once, for inference only.

    Images and results are float32 whatever the precision of the layers.
    """

    layers: Layers
    infos: tuple[LayerInfo, ...]  # what became of each layer: the rows of the report
    precision: str

    def __init__(self, layers: Layers, infos: tuple[LayerInfo, ...], precision: str, device: torch.device) -> None:
        self.layers, self.infos, self.precision, self._device = layers, infos, precision, device
        self._start(graphs=True)

    def _start(self, graphs: bool) -> None:
        """Make what belongs to one engine alone and holds nothing before the first call."""
        self._workspaces, self._text = WorkspacePool(self.device), TextMemo(self.layers)
        self._graphs = (GraphCache if self.device.type == "cuda" else CpuGraphCache)(enabled=graphs)

    def __getstate__(self) -> tuple[dict[str, Any], bool]:
        shared = ("_workspaces", "_text", "_graphs")
        return {name: value for name, value in vars(self).items() if name not in shared}, self.graphs

    def __setstate__(self, state: tuple[dict[str, Any], bool]) -> None:
        """A copied or unpickled engine has layers, memory, graphs and texts of its own."""
        attributes, graphs = state
        vars(self).update(attributes)
        self._start(graphs)

    @property
    def device(self) -> torch.device:
        """Device of the layers."""
        return self._device

    @property
    def graphs(self) -> bool:
        """Whether encoder, UNet and head run as graphs, captured on a GPU when images of a size come first.

        True by default. On a CPU they are captured the second time, if the stage needs little memory.
        """
        return self._graphs.enabled

    @graphs.setter
    def graphs(self, enabled: bool) -> None:
        self._graphs.enabled = enabled

    @property
    def nbytes(self) -> int:
        """Memory of the layers' weights in bytes."""
        return sum(t.nbytes for layer in self.layers.values() for t in layer.tensors().values())

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B,3,H,W) float32 in [-1,1], H and W multiples of 64 -> latents (B,4,H/8,W/8), times `latent_scale`.

        The latents are float32 whatever the precision, channels-last in memory. Raises InputError for other images.
        """
        checks.images(images, self.device, torch.float32, SIZE_MULTIPLE)

        def stage(images: Tensor) -> list[Tensor]:
            with self._workspaces.lease() as memory:
                return [encode(self.layers, to_nhwc(images), memory).float()]

        return to_nchw(self._graphs.run("encode", stage, images)[0])
