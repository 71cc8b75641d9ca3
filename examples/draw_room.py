"""Draws examples/room.jpg, a picture free of rights to try the commands on: python examples/draw_room.py"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

WIDTH, HEIGHT, SCALE = 640, 480, 3  # drawn SCALE times larger, then reduced: smooth edges


def draw() -> Image.Image:
    """A bedroom in perspective: (480, 640) RGB."""
    image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE))
    pen = ImageDraw.Draw(image)

    def shape(color: str, *points: tuple[float, float]) -> None:
        pen.polygon([(x * SCALE, y * SCALE) for x, y in points], fill=color)

    def box(color: str, x0: float, y0: float, x1: float, y1: float) -> None:
        shape(color, (x0, y0), (x1, y0), (x1, y1), (x0, y1))

    def disc(color: str, x: float, y: float, radius: float) -> None:
        pen.ellipse([v * SCALE for v in (x - radius, y - radius, x + radius, y + radius)], fill=color)

    shape("#e9e4da", (0, 0), (640, 0), (500, 90), (150, 90))  # ceiling
    box("#d7dee0", 150, 90, 500, 320)  # back wall
    shape("#9a7350", (0, 440), (150, 320), (500, 320), (640, 440), (640, 480), (0, 480))  # floor
    for i in range(-6, 16):  # boards
        pen.line(
            [((325 + (i - 5) * 35) * SCALE, 320 * SCALE), ((325 + (i - 5) * 90) * SCALE, 480 * SCALE)], "#87623f", 3
        )
    shape("#b9c4c9", (0, 0), (150, 90), (150, 320), (0, 440))  # left wall
    shape("#c9d3d6", (640, 0), (500, 90), (500, 320), (640, 440))  # right wall
    box("#f7f5ef", 190, 120, 310, 230)  # window
    box("#8fc0e8", 197, 127, 303, 223)
    disc("#fff3c4", 280, 150, 12)
    shape("#6f9a5b", (197, 223), (197, 200), (230, 185), (262, 203), (303, 192), (303, 223))
    box("#f7f5ef", 247, 120, 253, 230)
    shape("#b4553f", (170, 112), (196, 112), (188, 245), (166, 245))  # curtains
    shape("#b4553f", (304, 112), (330, 112), (334, 245), (312, 245))
    box("#5b4636", 380, 130, 460, 190)  # painting
    box("#e8d9a8", 386, 136, 454, 184)
    shape("#4b7a8c", (386, 184), (410, 150), (430, 172), (440, 160), (454, 184))
    shape("#7b2f3b", (260, 470), (330, 345), (490, 345), (560, 470))  # rug
    shape("#6b4a2f", (330, 250), (500, 250), (500, 330), (330, 330))  # bed: head, mattress, blanket, pillows
    shape("#f1efe9", (335, 290), (498, 290), (600, 400), (370, 400))
    shape("#3f5f8a", (350, 325), (530, 325), (600, 400), (370, 400))
    shape("#31496b", (370, 400), (600, 400), (600, 440), (370, 440))
    shape("#ffffff", (350, 285), (405, 285), (412, 306), (352, 306))
    shape("#ffffff", (425, 285), (482, 285), (500, 306), (432, 306))
    shape("#5e4028", (60, 310), (130, 290), (130, 380), (60, 420))  # cabinet and lamp
    shape("#7a5638", (60, 310), (130, 290), (165, 300), (95, 322))
    shape("#6b4a2f", (95, 322), (165, 300), (165, 370), (95, 415))
    box("#d9b24c", 108, 262, 114, 304)
    shape("#f6e3a1", (92, 264), (130, 264), (121, 225), (101, 225))
    for x, y in ((226, 300), (238, 285), (250, 297), (232, 270), (245, 275)):  # plant
        disc("#3f7a45", x, y, 13)
    shape("#c77b4a", (222, 308), (256, 308), (250, 345), (228, 345))

    image = image.resize((WIDTH, HEIGHT), Image.LANCZOS).filter(ImageFilter.GaussianBlur(0.6))
    light = np.linspace(1.08, 0.82, WIDTH)[None, :, None] * np.linspace(1.03, 0.92, HEIGHT)[:, None, None]
    noise = np.random.default_rng(0).normal(0, 3, (HEIGHT, WIDTH, 3))
    return Image.fromarray(np.clip(np.asarray(image) * light + noise, 0, 255).astype(np.uint8))


if __name__ == "__main__":
    draw().save(Path(__file__).with_name("room.jpg"), quality=92)
