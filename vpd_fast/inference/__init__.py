"""Prediction on real images: reading, windows, flips and scales, results and pictures of them."""

from vpd_fast.inference.depth import DepthPredictor, scene_from_filename
from vpd_fast.inference.drawing import heatmap_grid, heatmap_overlay
from vpd_fast.inference.images import read_image
from vpd_fast.inference.predict import make_predictor, predict, predict_each
from vpd_fast.inference.referring import ReferringPredictor
from vpd_fast.inference.results import (
    AttentionMaps,
    DepthResult,
    ReferringResult,
    Result,
    SegmentationResult,
    save_png,
)
from vpd_fast.inference.segmentation import SegmentationPredictor, slide_inference

__all__ = [
    "AttentionMaps",
    "DepthPredictor",
    "DepthResult",
    "ReferringPredictor",
    "ReferringResult",
    "Result",
    "SegmentationPredictor",
    "SegmentationResult",
    "heatmap_grid",
    "heatmap_overlay",
    "make_predictor",
    "predict",
    "predict_each",
    "read_image",
    "save_png",
    "scene_from_filename",
    "slide_inference",
]
