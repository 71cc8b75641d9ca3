"""Deterministic weights of the golden cases: every tensor is a function of its state-dict name, shape and one seed.

Used to fill a model whose state-dict keys are those of the released VPD checkpoints, so no weights need to be stored.
"""

import math
import zlib

import numpy as np


def golden_tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """float32 array for the state-dict entry `name`. Weights ~ N(0, 1/fan_in), norms near 1, biases small."""
    rng = np.random.default_rng((zlib.crc32(name.encode()), seed))
    if name.endswith("class_embeddings"):
        return rng.standard_normal(shape, dtype=np.float32)
    if len(shape) > 1:
        fan_in = math.prod(shape[1:])
        return rng.standard_normal(shape, dtype=np.float32) / np.float32(math.sqrt(fan_in))
    if name.endswith("running_var"):
        return 1 + 0.2 * rng.random(shape, dtype=np.float32)
    if name.endswith("running_mean"):
        return 0.1 * rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("gamma"):
        return 0.5 * rng.random(shape, dtype=np.float32)
    if name.endswith("bias"):
        return 0.05 * rng.standard_normal(shape, dtype=np.float32)
    return 1 + 0.1 * rng.standard_normal(shape, dtype=np.float32)


def golden_input(tag: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """float32 input named `tag`, uniform in [-1, 1] (images) ; callers rescale where a model wants another range."""
    rng = np.random.default_rng((zlib.crc32(("input:" + tag).encode()), seed))
    return rng.random(shape, dtype=np.float32) * 2 - 1
