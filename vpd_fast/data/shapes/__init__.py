"""The shapes world: rooms with a few solids, drawn from a seed, with labels, depth, captions and referring sentences.

Small enough to train on, and to show on, any machine. `make_scene` draws one scene, `stream` as many as one wants,
`ShapesDataset` is a data set of any task, `export` writes folders in the formats of ADE20K, NYUv2 and RefCOCO.
"""

from vpd_fast.data.shapes.dataset import ShapesDataset
from vpd_fast.data.shapes.export import export
from vpd_fast.data.shapes.language import VOCABULARY
from vpd_fast.data.shapes.world import CLASSES, SPLITS, Scene, SceneObject, make_scene, stream

__all__ = ["CLASSES", "SPLITS", "VOCABULARY", "Scene", "SceneObject", "ShapesDataset", "export", "make_scene", "stream"]
