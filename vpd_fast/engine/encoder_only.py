"""The KL encoder alone as an engine: latents for a model that is being trained behind it."""

from __future__ import annotations

from itertools import takewhile

import torch
from torch import Tensor

from vpd_fast.config import SIZE_MULTIPLE
from vpd_fast.engine.build import LayerInfo
from vpd_fast.engine.encoder import run_encoder
from vpd_fast.engine.graphs import GraphCache
from vpd_fast.engine.optimize import build_layers, check_choices, check_model
from vpd_fast.engine.policy import Policy
from vpd_fast.engine.specs import layer_specs
from vpd_fast.engine.workspace import WorkspacePool
from vpd_fast.models import checks
from vpd_fast.models.vpd import VPD


class FastEncoder:
    """`encode` of the fast form of a model, and nothing else of it. No gradients; several threads may call it at once.

    model: a plain float32 model, in training mode or not; its encoder's weights are copied, so later changes to them
    are not seen. precision, policy, device, graphs: as in `vpd_fast.optimize`. Raises InputError as that does.
    """

    def __init__(
        self,
        model: VPD,
        precision: str = "fp32",
        policy: Policy | None = None,
        *,
        device: torch.device | str | None = None,
        graphs: bool = True,
    ) -> None:
        check_model(model, precision)
        # The encoder comes first, and the weights of what follows need not be looked at.
        specs = list(takewhile(lambda spec: spec.name.startswith("encoder."), layer_specs(model)))
        policy, self.device = check_choices(policy, specs, precision, device, model)
        self.precision = precision
        self.infos: tuple[LayerInfo, ...]
        self._layers, self.infos = build_layers(specs, precision, policy, self.device)
        self._workspaces, self._graphs = WorkspacePool(self.device), GraphCache()
        self._graphs.enabled = graphs

    @property
    def nbytes(self) -> int:
        """Memory of the layers' weights."""
        return sum(t.nbytes for layer in self._layers.values() for t in layer.tensors().values())

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B,3,H,W) float32 in [-1,1], H and W multiples of 64 -> latents (B,4,H/8,W/8), times `latent_scale`.

        float32 whatever the precision, channels-last in memory. Raises InputError.
        """
        checks.images(images, self.device, torch.float32, SIZE_MULTIPLE)
        return run_encoder(self._layers, self._workspaces, self._graphs, images)
