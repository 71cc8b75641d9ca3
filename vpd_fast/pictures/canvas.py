"""Pictures for people: predictions over the photo, with legends, scales and captions, and what they are drawn with."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vpd_fast.errors import ImageError
from vpd_fast.pictures.palette import PALETTE_SIZE, palette
from vpd_fast.pictures.reading import to_uint8
from vpd_fast.pictures.resizing import resize_area

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont  # the latter where Pillow has no FreeType
LONGEST, SHORTEST = 1280, 480  # the photo's longer side is brought into this range
BACKGROUND, TEXT, FAINT = (24, 26, 31), (236, 238, 242), (150, 156, 168)
MARGIN = 16
FONT_SIZE = 18
LEGEND_ROWS = 16
LEAST_SPREAD = 0.01  # metres: a flat depth map keeps one colour
SMALLEST_NAMED = 0.01  # of the image: smaller regions get no name drawn on them
NAMING_SIDE = 160  # pixels of the longer side of the map on which names are placed
CLASS_ALPHA, MASK_ALPHA = 0.55, 0.4  # shares of the colours that are laid over a photo
OUTSIDE = (0.35, 0.15)  # shares of grey and of its own colours that the photo outside of masks keeps


def segmentation_overlay(
    image: np.ndarray, labels: np.ndarray, names: Sequence[str], shares: Mapping[str, float]
) -> Image.Image:
    """Draw the photo with classes in colour, their borders and names, and a legend of the largest ones."""
    picture, colours = named_classes(image, labels, names), palette(len(names))
    by_name = {name: tuple(colours[i].tolist()) for i, name in reversed(list(enumerate(names)))}
    rows = [(by_name[name], name, _percent(share)) for name, share in list(shares.items())[:LEGEND_ROWS]]
    more = len(shares) - len(rows)
    return beside(picture, _legend(rows, f"and {more} more" if more > 0 else ""))


def named_classes(image: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Image.Image:
    """Draw the photo with classes in colour, their borders and names: a picture whose size the photo's decides."""
    photo = display_photo(image)
    small = sample_nearest(labels.astype(np.min_scalar_type(len(names) - 1)), photo.shape[:2])
    blended = cv2.addWeighted(photo, 1 - CLASS_ALPHA, paint(small), CLASS_ALPHA, 0)
    cv2.copyTo(np.full_like(blended, 255), label_borders(small).view(np.uint8), blended)
    picture = Image.fromarray(blended)
    name_regions(picture, small, names)
    return picture


def referring_overlay(image: np.ndarray, masks: np.ndarray, sentences: Sequence[str]) -> Image.Image:
    """Draw the photo darkened outside the masks, each mask tinted and outlined in its colour, the sentences below."""
    photo = display_photo(image)
    size = photo.shape[:2]
    small = [sample_nearest(mask, size) for mask in masks]
    small = [np.ascontiguousarray(mask, bool).view(np.uint8) for mask in small]
    grey, own = OUTSIDE
    picture = cv2.transform(photo, np.full((3, 3), grey / 3) + own * np.eye(3))
    cv2.copyTo(photo, np.bitwise_or.reduce(small), picture)
    colours = palette(len(masks))
    levels = np.arange(256)[:, None] * (1 - MASK_ALPHA)
    for mask, colour in zip(small, colours, strict=True):
        table = np.rint(levels + colour * MASK_ALPHA).astype(np.uint8)
        cv2.copyTo(cv2.LUT(picture, table[:, None]), mask, picture)
    for mask, colour in zip(small, colours, strict=True):
        outlines, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(picture, outlines, -1, (255, 255, 255), 4, cv2.LINE_AA)
        cv2.drawContours(picture, outlines, -1, colour.tolist(), 2, cv2.LINE_AA)
    shares = [_percent(np.count_nonzero(mask) / mask.size) for mask in masks]
    return above(
        Image.fromarray(picture), _captions(list(zip(colours.tolist(), sentences, shares, strict=True)), size[1])
    )


def depth_overlay(image: np.ndarray, depth: np.ndarray) -> Image.Image:
    """Draw the photo beside the depth (near is bright) and a scale in metres. Raises ImageError for NaN, infinity."""
    _check_finite(depth, "the depth")
    photo = display_photo(image)
    near, far = float(depth.min()), float(depth.max())
    small = resize_area(depth.astype(np.float32), photo.shape[:2])
    closeness = 1 - (small - near) / max(far - near, LEAST_SPREAD)
    coloured = apply_colour_map(closeness, cv2.COLORMAP_INFERNO)
    height, width = photo.shape[:2]
    if width > 1.4 * height:
        pair = np.concatenate([photo, np.full((8, width, 3), BACKGROUND, np.uint8), coloured], 0)
    else:
        pair = np.concatenate([photo, np.full((height, 8, 3), BACKGROUND, np.uint8), coloured], 1)
    return beside(Image.fromarray(pair), _scale(near, far, max(pair.shape[0], 240)))


def heatmap_overlay(image: np.ndarray, heat: np.ndarray, title: str | None = None) -> Image.Image:
    """Draw the photo under a heat map (H, W): dark at its lowest values, coloured at its highest.

    title: written above, with the lowest and the highest value. Raises ImageError for NaN and infinity.
    """
    return heatmap(display_photo(image), heat, title)


def heatmap_grid(image: np.ndarray, maps: Mapping[str | int, np.ndarray], keys: Sequence[str | int]) -> Image.Image:
    """Draw the photo and `heatmap_overlay`s of the maps named by `keys`, in a nearly square grid."""
    columns = int(np.ceil(np.sqrt(len(keys) + 1)))
    photo = display_photo(image, longest=max(LONGEST * 3 // 2 // columns, 160))
    tiles = [titled(Image.fromarray(photo), "photo", "")]
    tiles += [heatmap(photo, maps[key], str(key)) for key in keys]
    width, height = tiles[0].size
    rows = -(-len(tiles) // columns)
    grid = Image.new("RGB", (columns * (width + 8) - 8, rows * (height + 8) - 8), BACKGROUND)
    for i, tile in enumerate(tiles):
        grid.paste(tile, (i % columns * (width + 8), i // columns * (height + 8)))
    return grid


def display_photo(image: np.ndarray, longest: int = LONGEST) -> np.ndarray:
    """Return the photo (H,W,3) as uint8, resized so that its longer side has SHORTEST to `longest` pixels."""
    height, width = image.shape[:2]
    side = max(height, width)
    scale = min(max(side, min(SHORTEST, longest)), longest) / side
    return to_uint8(np.clip(resize_area(image, (max(round(height * scale), 1), max(round(width * scale), 1))), 0, 255))


def paint(labels: np.ndarray) -> np.ndarray:
    """Return labels (H,W) of integers in the palette's colours, (H,W,3) uint8, by one look-up table."""
    numbers = labels if labels.dtype == np.uint8 else (labels % PALETTE_SIZE).astype(np.uint8)
    return cv2.applyColorMap(numbers, palette(PALETTE_SIZE)[:, None])


def sample_nearest(values: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Return values (H,W) at the centres of the pixels of a picture of `size` (height, width): no interpolation."""
    if values.shape == tuple(size):
        return values
    rows, columns = ((np.arange(n) + 0.5) * whole / n for n, whole in zip(size, values.shape, strict=True))
    return values[rows.astype(int)[:, None], columns.astype(int)]


def tint(photo: np.ndarray, colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Blend the photo (H,W,3) with colours of its shape, or one colour (3,), of which alpha (H,W,1) is the share."""
    return np.rint(photo * (1 - alpha) + colours * alpha).astype(np.uint8)


def label_borders(labels: np.ndarray) -> np.ndarray:
    """Return where labels (H,W) differ from the pixel to the left or above, (H,W) bool."""
    borders = np.zeros(labels.shape, bool)
    borders[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    borders[1:] |= labels[1:] != labels[:-1]
    return borders


def name_regions(picture: Image.Image, labels: np.ndarray, names: Sequence[str]) -> None:
    """Write the class on the widest spot of its largest region, where it fits.

    The spot is looked for on a map of at most NAMING_SIDE pixels a side: a few pixels do not matter to a name.
    """
    step = -(-max(labels.shape) // NAMING_SIDE)
    small = labels[step // 2 :: step, step // 2 :: step]
    small = small if small.size else labels
    counts = np.bincount(small.ravel())
    for label in np.flatnonzero(counts >= max(SMALLEST_NAMED * small.size, 1)):
        mask = cv2.copyMakeBorder((small == label).view(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
        distance = cv2.distanceTransform(mask, cv2.DIST_L2, 3)[1:-1, 1:-1]
        _, widest, _, (x, y) = cv2.minMaxLoc(distance)
        name = str(names[int(label)])
        if widest * step > 0.35 * text_length(name):
            spot = (x * step + step // 2, y * step + step // 2)
            write(picture, spot, name, (0, 0, 0), anchor="mm", stroke=2)
            write(picture, spot, name, TEXT, anchor="mm")


@lru_cache(maxsize=2048)
def _lettering(text: str, size: int, anchor: str, stroke: int) -> tuple[Image.Image, int, int]:
    """Return how much of each pixel a text covers (mode L), and where that lies from its anchor: x, y."""
    font = load_font(size)
    left, top, right, bottom = map(round, font.getbbox(text, anchor=anchor, stroke_width=stroke))
    mask = Image.new("L", (max(right - left, 1), max(bottom - top, 1)))
    ImageDraw.Draw(mask).text((-left, -top), text, 255, font, anchor=anchor, stroke_width=stroke)
    return mask, left, top


def write(
    picture: Image.Image,
    spot: tuple[int, int],
    text: str,
    colour: tuple[int, int, int],
    size: int = FONT_SIZE,
    *,
    anchor: str = "lm",
    stroke: int = 0,
) -> None:
    """Write a text at a spot (x, y); anchor: as Pillow's. Letters are kept, as pictures of a run repeat their words."""
    mask, x, y = _lettering(text, size, anchor, stroke)
    picture.paste(colour, (spot[0] + x, spot[1] + y), mask)


@lru_cache(maxsize=2048)
def text_length(text: str, size: int = FONT_SIZE) -> float:
    """Return the width of a text in pixels."""
    return load_font(size).getlength(text)


def heatmap(photo: np.ndarray, heat: np.ndarray, title: str | None = None) -> Image.Image:
    """Draw `heatmap_overlay` on a photo that already has the size of the picture."""
    _check_finite(heat, "the heat map")
    small = resize_area(heat.astype(np.float32), photo.shape[:2])
    low, high = float(heat.min()), float(heat.max())
    strength = np.clip((small - low) / max(high - low, 1e-12), 0, 1)
    picture = tint(
        dark_grey(photo), apply_colour_map(strength, cv2.COLORMAP_TURBO), 0.1 + 0.6 * strength[..., None] ** 0.7
    )
    tile = Image.fromarray(picture)
    return tile if title is None else titled(tile, title, f"{low:.2g} to {high:.2g}")


def dark_grey(photo: np.ndarray) -> np.ndarray:
    """Return the photo (H,W,3) in grey at 55 % of its brightness, as floats, to lay colours over."""
    return np.repeat(photo.mean(2, keepdims=True) * 0.55, 3, axis=2)


def apply_colour_map(values: np.ndarray, colours: int) -> np.ndarray:
    """Return values (H,W) in [0, 1] as RGB (H,W,3) uint8 in one of OpenCV's colour maps (cv2.COLORMAP_*)."""
    indices = np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(indices, colours), cv2.COLOR_BGR2RGB)


@lru_cache(maxsize=8)
def load_font(size: int) -> Font:
    """Return Pillow's own font at a size in pixels."""
    return ImageFont.load_default(size)


def _check_finite(values: np.ndarray, name: str) -> None:
    if not np.isfinite(values).all():
        raise ImageError(f"{name} has values that are not finite (NaN or infinity) and is not drawn")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%" if share >= 0.001 else "<0.1%"


def _legend(rows: Sequence[tuple[tuple[int, int, int], str, str]], footer: str) -> Image.Image:
    """Draw swatches with names and values."""
    line = FONT_SIZE + 10
    names = max(text_length(name) for _, name, _ in rows)
    values = max(text_length(value) for _, _, value in rows)
    width = round(MARGIN + 28 + names + 24 + values + MARGIN)
    panel = Image.new("RGB", (width, 2 * MARGIN + line * (len(rows) + bool(footer))), BACKGROUND)
    for i, (colour, name, value) in enumerate(rows):
        middle = MARGIN + line * i + line // 2
        panel.paste(tuple(colour), (MARGIN, middle - 8), _swatch(17, 17))
        write(panel, (MARGIN + 28, middle), name, TEXT)
        write(panel, (width - MARGIN, middle), value, FAINT, anchor="rm")
    if footer:
        write(panel, (MARGIN + 28, MARGIN + line * len(rows) + line // 2), footer, FAINT)
    return panel


@lru_cache(maxsize=8)
def _swatch(width: int, height: int) -> Image.Image:
    """Return a rectangle with round corners, as a mask."""
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, width - 1, height - 1), 4, fill=255)
    return mask


def _captions(rows: Sequence[tuple[Sequence[int], str, str]], width: int) -> Image.Image:
    """Draw sentences with swatches, wrapped to `width`."""
    size = FONT_SIZE + 2
    width = max(width, 320)
    line = FONT_SIZE + 12
    wrapped = [(colour, _wrap(f"{text}  ({value})", size, width - 2 * MARGIN - 28)) for colour, text, value in rows]
    panel = Image.new("RGB", (width, 2 * MARGIN + line * sum(len(lines) for _, lines in wrapped)), BACKGROUND)
    middle = MARGIN + line // 2
    for colour, lines in wrapped:
        panel.paste(tuple(colour), (MARGIN, middle - 9), _swatch(19, 19))
        for text in lines:
            write(panel, (MARGIN + 28, middle), text, TEXT, size)
            middle += line
    return panel


def _wrap(text: str, size: int, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and text_length(longer, size) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _scale(near: float, far: float, height: int) -> Image.Image:
    """Draw a colour bar, near at the bottom, with about six round numbers of metres."""
    panel = Image.new("RGB", (112, height), BACKGROUND)
    top, bottom = MARGIN + 32, height - MARGIN - 12
    bar = apply_colour_map(
        np.linspace(0, 1, bottom - top, dtype=np.float32)[:, None].repeat(24, 1), cv2.COLORMAP_INFERNO
    )
    panel.paste(Image.fromarray(bar), (MARGIN, top))
    write(panel, (MARGIN, MARGIN + 4), "metres", FAINT)
    draw = ImageDraw.Draw(panel)
    spread = max(far - near, LEAST_SPREAD)
    step = _round_step(spread / 6)
    decimals = max(0, -int(np.floor(np.log10(step) + 1e-9)))
    for value in np.arange(np.ceil(near / step - 1e-6), np.floor((near + spread) / step + 1e-6) + 1) * step:
        y = round(bottom - (value - near) / spread * (bottom - top))
        draw.line((MARGIN + 24, y, MARGIN + 32, y), TEXT)
        write(panel, (MARGIN + 38, y), f"{value:.{decimals}f}", TEXT)
    return panel


def _round_step(least: float) -> float:
    """Return the smallest of 1, 2, 5, 10, ... times a power of ten that is at least `least`."""
    power = 10 ** np.floor(np.log10(least))
    return next(float(factor * power) for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def titled(tile: Image.Image, title: str, note: str) -> Image.Image:
    """Draw a title above the picture, and a note at the right where there is room."""
    bar = Image.new("RGB", (tile.width, FONT_SIZE + 14), BACKGROUND)
    write(bar, (8, bar.height // 2), title, TEXT)
    if note and text_length(title) + text_length(note) + 32 < tile.width:
        write(bar, (bar.width - 8, bar.height // 2), note, FAINT, anchor="rm")
    return above(bar, tile)


def beside(left: Image.Image, right: Image.Image) -> Image.Image:
    """Put two pictures beside each other, aligned at the top."""
    both = Image.new("RGB", (left.width + right.width, max(left.height, right.height)), BACKGROUND)
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both


def above(top: Image.Image, bottom: Image.Image) -> Image.Image:
    """Put two pictures below each other, aligned at the left."""
    both = Image.new("RGB", (max(top.width, bottom.width), top.height + bottom.height), BACKGROUND)
    both.paste(top, (0, 0))
    both.paste(bottom, (0, top.height))
    return both
