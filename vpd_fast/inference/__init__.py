"""Prediction on real images: reading, windows, flips and scales, results and pictures of them."""

from vpd_fast.inference.depth import DepthPredictor
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
from vpd_fast.labels import scene_from_filename
from vpd_fast.pictures.canvas import heatmap_grid, heatmap_overlay
from vpd_fast.pictures.reading import read_image

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
