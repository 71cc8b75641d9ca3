"""What `train_cfg` and `test_cfg` of a segmentor may have."""

from __future__ import annotations

from dataclasses import dataclass

from vpd_fast.errors import InputError, brief
from vpd_fast.inference.windows import WindowGrid, check_pair


@dataclass(frozen=True)
class TestSettings:
    """What `test_cfg` may have.

    mode: "slide" merges windows, "whole" makes one forward of the image; sides that are no multiples of 64 are padded
        with grey, whose logits are cut off.
    crop_size, stride: of the windows, pixels or (height, width); None: base_size, and two thirds of the crop.
    batch_size: windows per forward; None: 1 on a CPU, 8 on a GPU.
    seg_logits: keep each image's logits at its own size (4 bytes x classes x pixels), as mmseg does; labels need none.
    """

    mode: str = "slide"
    crop_size: int | tuple[int, ...] | None = None
    stride: int | tuple[int, ...] | None = None
    batch_size: int | None = None
    seg_logits: bool = True

    def __post_init__(self) -> None:
        if self.mode not in ("slide", "whole"):
            raise InputError(f'test_cfg.mode must be "slide" or "whole", got {brief(self.mode)}')

    def grid(self, size: tuple[int, int], base_size: int) -> WindowGrid:
        """Return the windows of an image of size (height, width). Raises InputError."""
        if self.mode == "whole":
            return WindowGrid.sliding(size, size, size)
        crop = check_pair("test_cfg.crop_size", base_size if self.crop_size is None else self.crop_size)
        thirds = crop[0] * 2 // 3, crop[1] * 2 // 3
        step = check_pair("test_cfg.stride", thirds if self.stride is None else self.stride)
        if step[0] > crop[0] or step[1] > crop[1]:
            raise InputError(
                f"test_cfg.stride {step} must not exceed crop_size {crop}: pixels between windows would have no "
                "prediction"
            )
        return WindowGrid.sliding(size, crop, step)


@dataclass(frozen=True)
class TrainSettings:
    """What `train_cfg` may have.

    checkpointing: of gradients: levels of the UNet whose blocks are recomputed in backward, True: all, False: none.
    ignored_in_mean: ignored pixels count in the mean of the loss, as in the original; False: they do not.
    """

    checkpointing: bool | tuple[int, ...] = False
    ignored_in_mean: bool = True
