"""Ray casting of solids in a room: colour with shadows, depth, and which solid is seen.

Coordinates in metres: x to the right, y up, z away from the camera's foot, the floor at y = 0. A ray is origin + t *
direction; camera rays have t = depth along the optical axis. Everything is NumPy on all rays of a solid at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

FAR = np.inf
SHAPES = ("sphere", "cube", "cylinder", "cone", "pyramid", "ring")
TEXTURES = ("plain", "striped", "checkered", "dotted")
AMBIENT = 0.38
_SMALL = 1e-4  # shadow rays start this far above a surface, in metres
_RING_STEPS = 24  # of sphere tracing


@dataclass(frozen=True)
class Camera:
    """height above the floor in metres, pitch downwards and horizontal field of view in degrees."""

    height: float = 2.3
    pitch: float = 18.0
    view: float = 52.0

    def rays(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the origin (3,) and directions (size*size,3) through the pixels' centres, row by row."""
        steps = ((np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1) * math.tan(math.radians(self.view / 2))
        right, down = np.meshgrid(steps, steps)
        cos, sin = math.cos(math.radians(self.pitch)), math.sin(math.radians(self.pitch))
        directions = np.stack([right, -sin - cos * down, cos - sin * down], axis=-1)
        return np.array([0, self.height, 0], np.float32), directions.reshape(-1, 3).astype(np.float32)


@dataclass(frozen=True)
class Solid:
    """A shape of height 2 * radius that stands on the floor at (x, z), turned by `angle` about the vertical."""

    shape: str
    x: float
    z: float
    radius: float
    angle: float
    albedo: tuple[float, float, float]
    texture: str = "plain"

    @property
    def center(self) -> np.ndarray:
        """Middle of its bounding box (3,)."""
        return np.array([self.x, self.radius, self.z], np.float32)

    def hit(self, origins: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Intersect with rays (N,3): t (N,) of first hits, FAR without; normals and local points (N,3) of radius 1."""
        count = len(directions)
        t, normals, points = (
            np.full(count, FAR, np.float32),
            np.zeros((count, 3), np.float32),
            np.zeros((count, 3), np.float32),
        )
        near = _near_sphere(origins - self.center, directions, self.radius * math.sqrt(3))
        if near.size:
            cos, sin = math.cos(self.angle), math.sin(self.angle)
            turn = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]], np.float32)
            o = ((np.broadcast_to(origins, directions.shape)[near] - self.center) / self.radius) @ turn
            d = (directions[near] / self.radius) @ turn
            t[near], local = _HITS[self.shape](o, d)
            met = near[np.isfinite(t[near])]
            inside = np.isfinite(t[near])
            normals[met] = local[inside] @ turn.T
            points[met] = o[inside] + t[met, None] * d[inside]
        return t, normals, points


def _near_sphere(offset: np.ndarray, directions: np.ndarray, radius: float) -> np.ndarray:
    """Return the indices of rays that come near the origin in front of them."""
    along = (offset * directions).sum(-1)
    square = (directions * directions).sum(-1)
    distance = (offset * offset).sum(-1) - along * along / square
    return np.nonzero((distance < radius * radius) & (along < radius * np.sqrt(square)))[0]


def _first_root(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both solutions of a t^2 + 2 b t + c = 0, the smaller first, FAR where there is none."""
    root = b * b - a * c
    with np.errstate(divide="ignore", invalid="ignore"):
        s = np.sqrt(np.where(root > 0, root, np.nan))
        first, second = (-b - s) / a, (-b + s) / a
    low, high = np.fmin(first, second), np.fmax(first, second)
    return np.nan_to_num(low, nan=FAR), np.nan_to_num(high, nan=FAR)


def _sphere(o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    t, _ = _first_root((d * d).sum(-1), (o * d).sum(-1), (o * o).sum(-1) - 1)
    t = np.where(t > 0, t, FAR)
    return t, _at(o, d, t)


def _at(o: np.ndarray, d: np.ndarray, t: np.ndarray) -> np.ndarray:
    return o + np.where(np.isfinite(t), t, 0)[:, None] * d


def _half_spaces(normals: np.ndarray, limits: np.ndarray) -> object:
    """Intersect rays with a convex solid {p: normals @ p <= limits}."""

    def hit(o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        speed, room = d @ normals.T, limits - o @ normals.T
        with np.errstate(divide="ignore", invalid="ignore"):
            t = room / speed
        enter = np.where(speed < 0, t, -FAR)
        leave = np.where(speed > 0, t, FAR).min(1)
        face = enter.argmax(1)
        first = enter[np.arange(len(o)), face]
        misses = (first > leave) | (first <= 0) | ((speed == 0) & (room < 0)).any(1)
        return np.where(misses, FAR, first), normals[face]

    return hit


def _cylinder(o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    radius = 0.8
    flat, way = o[:, [0, 2]], d[:, [0, 2]]
    side, _ = _first_root((way * way).sum(-1), (flat * way).sum(-1), (flat * flat).sum(-1) - radius**2)
    height = o[:, 1] + np.where(np.isfinite(side), side, 0) * d[:, 1]
    side = np.where((np.abs(height) <= 1) & (side > 0), side, FAR)
    with np.errstate(divide="ignore", invalid="ignore"):
        top = (1 - o[:, 1]) / d[:, 1]
    place = _at(flat, way, top)
    top = np.where(np.isfinite(top) & (top > 0) & ((place * place).sum(-1) <= radius**2), top, FAR)
    t = np.minimum(side, top)
    normals = _at(o, d, t) / radius
    normals[:, 1] = 0
    normals[top < side] = (0, 1, 0)
    return t, normals


def _cone(o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # x^2 + z^2 = (k (1 - y))^2 between y = -1 and the tip at y = 1
    k = 0.5
    o2, sign = o - np.array([0, 1, 0], np.float32), np.array([1, -(k**2), 1], np.float32)
    found = _first_root((d * d * sign).sum(-1), (o2 * d * sign).sum(-1), (o2 * o2 * sign).sum(-1))
    t = np.full(len(o), FAR, np.float32)
    for root in reversed(found):
        height = o[:, 1] + np.where(np.isfinite(root), root, 0) * d[:, 1]
        t = np.where((np.abs(height) <= 1) & (root > 0) & np.isfinite(root), root, t)
    normals = _at(o2, d, t) * sign
    return t, normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-6)


def _ring(o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intersect rays with an upright torus by sphere tracing (Hart 1996)."""
    wide, thick = 0.67, 0.33

    def distance(p: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        around = np.hypot(p[:, 0], p[:, 1])
        out = around - wide
        return np.hypot(out, p[:, 2]) - thick, around, out

    speed = np.linalg.norm(d, axis=1)
    t = np.maximum(-(o * d).sum(-1) / speed**2 - 1.3 / speed, 0)  # before the bounding sphere
    for _ in range(_RING_STEPS):
        t = t + distance(o + t[:, None] * d)[0] / speed
    p = o + t[:, None] * d
    left, around, out = distance(p)
    normals = np.stack(
        [p[:, 0] * out / np.maximum(around, 1e-6), p[:, 1] * out / np.maximum(around, 1e-6), p[:, 2]], -1
    )
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-6)
    return np.where((np.abs(left) < 0.01) & (t > 0), t, FAR).astype(np.float32), normals


_AXES = np.eye(3, dtype=np.float32)
_CUBE = 0.8  # half an edge, so that a turned cube is about as wide as a sphere; it stands on the floor, too
_SLOPE = np.array([[2, 1, 0], [-2, 1, 0], [0, 1, 2], [0, 1, -2]], np.float32) / math.sqrt(5)
_HITS = {
    "sphere": _sphere,
    "cube": _half_spaces(
        np.concatenate([_AXES, -_AXES]), np.array([_CUBE, 2 * _CUBE - 1, _CUBE, _CUBE, 1, _CUBE], np.float32)
    ),
    "cylinder": _cylinder,
    "cone": _cone,
    "pyramid": _half_spaces(np.concatenate([_SLOPE, -_AXES[1:2]]), np.array([1 / math.sqrt(5)] * 4 + [1], np.float32)),
    "ring": _ring,
}


@dataclass(frozen=True)
class Room:
    """A floor, a wall at distance `wall` in metres, and the direction to the light (3,)."""

    wall: float
    floor_albedo: tuple[float, float, float]
    wall_albedo: tuple[float, float, float]
    floor_texture: str
    wall_texture: str
    light: tuple[float, float, float]


def pattern(texture: str, points: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """Return the brightness (N,) of a solid texture at points (N,3)."""
    p = points * scale
    if texture == "striped":
        dark = np.floor(p[:, 1] * 3.5) % 2 == 1
    elif texture == "checkered":
        dark = np.floor(p * 2.2 + 0.01).sum(-1) % 2 == 1
    elif texture == "dotted":
        cell = (p * 1.9) % 1 - 0.5
        dark = (cell * cell).sum(-1) < 0.12
    elif texture == "planks":
        dark = (p[:, 0] % 0.8) < 0.06
    elif texture == "bricks":
        row = np.floor(p[:, 1] * 2.5)
        dark = ((p[:, 1] * 2.5) % 1 < 0.1) | ((p[:, 0] + 0.4 * (row % 2)) % 0.8 < 0.05)
    elif texture == "tiles":
        return np.where((np.floor(p[:, 0] * 1.25) + np.floor(p[:, 2] * 1.25)) % 2 == 1, 0.82, 1.0)
    else:
        return np.ones(len(p), np.float32)
    return np.where(dark, 0.4 if texture in TEXTURES else 0.7, 1.0)


def trace(room: Room, solids: list[Solid], origin: np.ndarray, directions: np.ndarray) -> dict[str, np.ndarray]:
    """Find first hits: "depth" (N,) in metres, "seen" (N,): -2 wall, -1 floor, else the solid, "normals", "points",
    "each" (solids,N): whether the ray would meet this solid if it were alone."""
    with np.errstate(divide="ignore", invalid="ignore"):
        floor = np.where(directions[:, 1] < 0, -origin[1] / directions[:, 1], FAR)
        wall = np.where(directions[:, 2] > 0, (room.wall - origin[2]) / directions[:, 2], FAR)
    depth = np.minimum(floor, wall)
    seen = np.where(floor <= wall, -1, -2)
    normals = np.where((seen == -1)[:, None], _vector(0, 1, 0), _vector(0, 0, -1))
    points = origin + depth[:, None] * directions
    each = np.zeros((len(solids), len(directions)), bool)
    for i, solid in enumerate(solids):
        t, n, local = solid.hit(origin, directions)
        each[i] = np.isfinite(t)
        closer = t < depth
        depth, seen = np.where(closer, t, depth), np.where(closer, i, seen)
        normals[closer], points[closer] = n[closer], local[closer]
    return {"depth": depth, "seen": seen, "normals": normals, "points": points, "each": each}


def _vector(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def shade(room: Room, solids: list[Solid], origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Return colours (N,3) in [0,1] along camera rays: Lambert's law, one light far away, hard shadows."""
    hits = trace(room, solids, origin, directions)
    seen, normals, local = hits["seen"], hits["normals"], hits["points"]
    light = _vector(*room.light)
    albedo = np.empty((len(directions), 3), np.float32)
    for number, color, texture in (
        (-1, room.floor_albedo, room.floor_texture),
        (-2, room.wall_albedo, room.wall_texture),
    ):
        mask = seen == number
        albedo[mask] = _vector(*color) * pattern(texture, local[mask])[:, None]
    for i, solid in enumerate(solids):
        mask = seen == i
        albedo[mask] = _vector(*solid.albedo) * pattern(solid.texture, local[mask])[:, None]
    bright = np.maximum(normals @ light, 0)
    lit = np.nonzero(bright > 0)[0]
    starts = (origin + hits["depth"][lit, None] * directions[lit] + normals[lit] * _SMALL * 10).astype(np.float32)
    rays = np.broadcast_to(light, starts.shape)
    dark = np.zeros(len(lit), bool)
    for solid in solids:
        dark |= np.isfinite(solid.hit(starts, rays)[0])
    bright[lit[dark]] = 0
    return np.clip(albedo * (AMBIENT + (1 - AMBIENT) * bright)[:, None], 0, 1)
