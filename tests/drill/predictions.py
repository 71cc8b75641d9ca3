"""Predicts on COUNT images and writes their results: `predictions.py FOLDER COUNT WARM plain|int8`.

Prints a line of JSON: the memory of the process (bytes) after WARM predictions, and at its end.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from peak import memory
from PIL import Image

import vpd_fast
from vpd_fast import VPD, BackboneConfig, VPDConfig
from vpd_fast.inference import make_predictor
from vpd_fast.inference.listing import Shard
from vpd_fast.inference.predict_images import predict_images
from vpd_fast.inference.records import Records
from vpd_fast.inference.results import save_picture
from vpd_fast.models.random_weights import randomize

SIZES = [(40 + 5 * i, 96 - 4 * i) for i in range(12)]  # widths and heights
FILES = 64  # that results go to, again and again


def main() -> None:
    """Predict, record and write as `vpd-fast predict` does."""
    folder, count, warm, precision = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    backbone = BackboneConfig(
        model_channels=64, context_dim=32, num_heads=4, num_res_blocks=1, channel_mult=(1, 1, 1, 1), vae_ch=32,
        vae_ch_mult=(1, 1, 1, 1), vae_num_res_blocks=1,
    )  # fmt: skip
    config = VPDConfig(num_classes=5, channels=32, base_size=64, backbone=backbone)
    model = randomize(VPD.empty(config), 1).eval()
    predictor = make_predictor(model if precision == "plain" else vpd_fast.optimize(model, precision), mode="whole")
    rng = np.random.default_rng(0)
    paths = []
    for i, (size, ending) in enumerate(itertools.product(SIZES, ("png", "jpg"))):
        paths.append(folder / f"image{i}.{ending}")
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).save(paths[-1])

    def write(result: object, name: str) -> dict[str, object]:
        written = result.save(folder / f"{int(name) % FILES}.png")  # type: ignore[attr-defined]
        written.append(save_picture(result.overlay(), folder / f"{int(name) % FILES}_overlay.jpg"))  # type: ignore[attr-defined]
        return {**result.record(), "files": [path.name for path in written]}  # type: ignore[attr-defined]

    images = ((str(i), str(paths[i % len(paths)])) for i in range(count))
    start, after = time.process_time(), 0
    with Records(folder, Shard(), {"task": "segmentation"}) as sink:
        for number, _ in enumerate(predict_images(predictor, images, write, sink), 1):
            if number == warm:
                after = memory("VmRSS")
    done = {"done": sink.done, "failed": sink.failed, "seconds": round(time.process_time() - start, 1)}
    print(json.dumps({**done, "warm": after, "end": memory("VmRSS")}))


if __name__ == "__main__":
    main()
