"""How close a fast model is to what the original code returned."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vpd_fast.bench.parity import cosine


def assert_agrees_with_the_original(
    case: Any, inputs: tuple[Tensor, ...], expected: dict[str, Tensor], fast: Any, gate: float
) -> None:
    """Holds the cosine of every stored tensor to the gate, and prints it (pytest -rP)."""
    stride = case.settings.get("stride", 1)
    produced = {}
    if case.config.task == "depth":
        produced["pred_d"] = fast(*inputs)["pred_d"][..., ::stride, ::stride]
    else:
        features = fast.extract_feat(*inputs)
        logits = fast.decode(features, inputs[0].shape[2:])
        produced |= {"logits": logits[..., ::stride, ::stride], "argmax": logits.argmax(1)}
        widths = [fast.config.backbone.model_channels * m for m in fast.config.backbone.channel_mult]
        for i, (feature, width) in enumerate(zip(features, widths, strict=True)):
            produced[f"feature{i}"] = feature
            produced[f"feature{i}_every8th"] = feature[:, ::8]
            produced[f"maps{i}"] = feature[:, width:]
    common = sorted(set(produced) & set(expected))
    assert common
    for key in common:
        if key == "argmax":
            print(f"{fast.precision}: {(produced[key] == expected[key]).double().mean().item():.4f} of labels equal")
            continue
        similarity = cosine(produced[key], expected[key])
        print(f"{fast.precision} {key}: cosine {similarity:.6f}")
        assert similarity >= gate, key
