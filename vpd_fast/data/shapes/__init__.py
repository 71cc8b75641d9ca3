"""The shapes world: rooms with a few solids, drawn from a seed, with labels, depth, captions and referring sentences.

Small enough to train on, and to show on, any machine; see `make_scene`.
"""

from vpd_fast.data.shapes.dataset import ShapesDataset
from vpd_fast.data.shapes.language import VOCABULARY
from vpd_fast.data.shapes.world import CLASSES, SPLITS, Scene, SceneObject, make_scene

__all__ = ["CLASSES", "SPLITS", "VOCABULARY", "Scene", "SceneObject", "ShapesDataset", "make_scene"]
