"""The tasks that VPD is trained for, and what sets them apart: one table that every room looks up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """The properties of a task.

    metric, better: the metric that decides which of two models is the better one, and whether its "max" or "min" is.
    signature: names of weights that together tell the task's released checkpoints from the others'.
    key_prefix: what the names of the backbone's weights begin with in state dicts.
    count_field: the field of VPDConfig with the number of class embeddings; None where a text comes with each image.
    noun: what one class embedding stands for, "class" or "scene".
    unnamed: the name of the only embedding where a data set has no names; None where it must have them.
    size_multiple: sides of training images are multiples of this many pixels.
    maps: whether attention maps are concatenated to the features by default; with one token they are constant.
    augmented: whether the original's training transform changes images at random.
    rows: what a row of an evaluation's table is about.
    """

    metric: str
    better: str = "max"
    signature: tuple[str, ...] = ()
    key_prefix: str = ""
    count_field: str | None = None
    noun: str = "class"
    unnamed: str | None = None
    size_multiple: int = 64
    maps: bool = True
    augmented: bool = True
    rows: str = "images"

    @property
    def takes_text(self) -> bool:
        """Whether images are conditioned on sentences of their own, instead of embeddings that the model stores."""
        return self.count_field is None

    def is_better(self, value: float, other: float) -> bool:
        """Return whether `value` of the metric is the better one of two; NaN never is."""
        return value > other if self.better == "max" else value < other


TASKS: dict[str, Task] = {
    "segmentation": Task(
        "mIoU",
        signature=("decode_head.conv_seg.weight", "unet.unet.diffusion_model.input_blocks.0.0.weight"),
        count_field="num_classes",
    ),
    "referring": Task("oIoU", signature=("classifier.conv1_4.weight",), augmented=False, rows="sentences"),
    "depth": Task(
        "rmse",
        "min",
        signature=("last_layer_depth.0.weight", "encoder.out_layer.0.weight"),
        key_prefix="encoder.",
        count_field="num_scenes",
        noun="scene",
        unnamed="scene",
        size_multiple=32,
        maps=False,
    ),
}
