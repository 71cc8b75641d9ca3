"""The KL encoder alone as an engine: latents for a model that is being trained behind it."""

from __future__ import annotations

from itertools import takewhile

import torch

from vpd_fast.engine.base import Engine
from vpd_fast.engine.optimize import build_layers, check_choices, check_model
from vpd_fast.engine.policy import Policy
from vpd_fast.engine.specs import layer_specs
from vpd_fast.models.vpd import VPD


class FastEncoder(Engine):
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
        policy, target = check_choices(policy, specs, precision, device, model)
        layers, infos = build_layers(specs, precision, policy, target)
        super().__init__(layers, infos, precision, target)
        self.graphs = graphs
