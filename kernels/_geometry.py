"""Which positions of an image each position of a result reads."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """How output positions read an image: (B, OH, OW) from (B, H, W). A matrix is an image of width 1."""

    out_height: int
    out_width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    top: int = 0
    left: int = 0

    def reads_outside(self, height: int, width: int) -> bool:
        """Whether some position reads beyond an image of this size."""
        last_y = (self.out_height - 1) * self.stride - self.top + self.kernel[0]
        last_x = (self.out_width - 1) * self.stride - self.left + self.kernel[1]
        return self.top > 0 or self.left > 0 or last_y > height or last_x > width
