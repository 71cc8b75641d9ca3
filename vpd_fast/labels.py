"""Names that the released checkpoints were trained with: ADE20K classes, NYUv2 scenes, CLIP's prompt templates.

Their order is part of the checkpoints: class embedding i and output channel i belong to name i.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from vpd_fast.errors import InputError
from vpd_fast.tasks import TASKS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vpd_fast.config import VPDConfig


IGNORED = 255  # the label of pixels that no loss and no metric counts


def _split(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


# The SceneParse150 benchmark's order, which mmsegmentation's ADE20KDataset uses as well (label 0 "other" removed).
ADE20K_CLASSES: tuple[str, ...] = _split("""
    wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door,
    table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair,
    seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers,
    counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table,
    pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench,
    countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel,
    light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel,
    pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt,
    canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball,
    food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood,
    sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator,
    glass, clock, flag
""")

# The order of VPD's depth/nyu_class_list.json; "excercise_room" is how the dataset's folder is spelt.
NYU_SCENES: tuple[str, ...] = _split("""
    printer_room, bathroom, living_room, study, conference_room, study_room, kitchen, home_office, bedroom, dinette,
    playroom, indoor_balcony, laundry_room, basement, excercise_room, foyer, home_storage, cafe, furniture_store,
    office_kitchen, student_lounge, dining_room, reception_room, computer_lab, classroom, office, bookstore
""")


def _imagenet_templates() -> tuple[str, ...]:
    """Return the 80 prompts of CLIP's zero-shot ImageNet notebook, "{}" standing for the class."""
    photos = ("bad", "bright", "dark", "good", "blurry", "cropped", "pixelated", "low resolution", "jpeg corrupted")
    photos += ("close-up", "black and white")
    subjects = ("hard to see", "clean", "dirty", "cool", "nice", "weird", "small", "large")
    works = ("a sculpture", "a rendering", "a rendition", "a drawing", "a painting", "a sketch", "a doodle", "a tattoo")
    works += ("art", "graffiti", "itap")  # itap: "I took a picture"
    materials = ("embroidered", "plastic", "origami", "toy", "cartoon", "plushie")
    templates = ["a photo of many {}.", "a photo of one {}.", "a photo of my {}.", "itap of my {}."]
    for article in ("a", "the"):
        templates.append(f"a photo of {article} {{}}.")
        templates.append(f"{article} {{}} in a video game.")
        templates += [f"a {photo} photo of {article} {{}}." for photo in photos]
        templates += [f"a photo of {article} {subject} {{}}." for subject in subjects]
        templates += [f"{work} of {article} {{}}." for work in works]
        templates += [f"{article} {material} {{}}." for material in materials]
    return tuple(templates)


IMAGENET_TEMPLATES: tuple[str, ...] = _imagenet_templates()


def default_names(config: VPDConfig) -> tuple[str, ...]:
    """Return the names of a model's classes or scenes, one per class embedding; () for referring.

    The configuration's own names if it has any, else ADE20K's for 150 classes and NYUv2's for 27 or 28 scenes (the
    28th of the mmsegmentation port is the mean of the others), else "class 0", "class 1", ...
    """
    count, noun = config.embedding_count, TASKS[config.task].noun
    if count is None or config.class_names:
        return config.class_names
    known = {"class": (ADE20K_CLASSES,), "scene": (NYU_SCENES, (*NYU_SCENES, "mean"))}[noun]
    matching = [names for names in known if len(names) == count]
    return matching[0] if matching else tuple(f"{noun} {i}" for i in range(count))


def find_name(name: str | int, names: tuple[str, ...], kind: str = "class") -> int:
    """Return the index of a class or scene given by name (case, spaces and underscores do not matter) or by number.

    Raises InputError naming the closest known names.
    """
    text = str(name).strip()
    if text.lstrip("-").isdigit():
        index = int(text)
        if not 0 <= index < len(names):
            raise InputError(f"{kind} number must be 0 to {len(names) - 1}, got {index}")
        return index
    plain = [_plain(known) for known in names]
    if _plain(text) in plain:
        return plain.index(_plain(text))
    close = difflib.get_close_matches(_plain(text), plain, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(names[plain.index(c)] for c in close)}?" if close else f"known: {', '.join(names)}"
    raise InputError(f"unknown {kind} {text!r}; {hint}")


def scene_from_filename(filename: str, scenes: Sequence[str]) -> int | None:
    """Index of the first of `scenes` that the file name contains, or None: the reference's rule for NYU images.

    The order of the list decides, so "study_room_0004.jpg" gives "study" if that comes first.
    """
    return next((i for i, scene in enumerate(scenes) if scene in filename), None)


def _plain(name: str) -> str:
    return name.replace("_", " ").strip().casefold()
