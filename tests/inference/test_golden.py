"""Sliding windows and flips give what the original code returned."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vpd_fast.inference import slide_inference


def test_sliding_windows_and_flip_match_the_original(golden: Callable) -> None:
    case = golden("seg_small")
    model, slide, crop = case.model(), case.settings["slide"], case.config.base_size
    image = case.input("slide", (1, 3, *slide["size"]))
    arguments = {"crop_size": crop, "stride": tuple(slide["stride"]), "out_size": tuple(slide["ori"])}
    probabilities = slide_inference(model, image, **arguments, batch_size=2)
    flipped = slide_inference(model, image.flip(3), **arguments, flip="horizontal")

    expected = case.tensors
    error = (probabilities[..., ::3, ::3] - expected["slide_prob"]).norm() / expected["slide_prob"].norm()
    equal = (probabilities.argmax(1) == expected["slide_argmax"]).double().mean()
    equal_flip = ((probabilities + flipped).argmax(1) == expected["aug_argmax"]).double().mean()
    print(f"slide_prob: relative L2 {error:.1e}; labels equal: slide_argmax {equal:.6f}, aug_argmax {equal_flip:.6f}")
    assert error <= 1e-4
    assert equal >= 0.999
    assert equal_flip >= 0.999
    torch.testing.assert_close(probabilities.sum(1), torch.ones(1, *slide["ori"]))
