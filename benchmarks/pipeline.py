"""What surrounds the model, from files to files: `python benchmarks/pipeline.py [--json FILE] [--chart FILE]`.

Copies of a photo of 640x480 pixels become labels or depths, and overlays, as `vpd-fast predict` makes them; the model
is a stand-in that answers after so many milliseconds. Core-ms are processor time of the whole process per image.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from encoders import scene
from PIL import Image

from vpd_fast.bench import pipeline, plots
from vpd_fast.bench.environment import device_name
from vpd_fast.config import BackboneConfig, VPDConfig
from vpd_fast.files import write_files
from vpd_fast.inference import DepthResult, SegmentationResult, make_predictor
from vpd_fast.labels import ADE20K_CLASSES
from vpd_fast.models import VPD

ROUNDS = 3
# Nothing of it is computed; images are resized for its base size.
LEAST = BackboneConfig(model_channels=32, context_dim=32, num_heads=4, num_res_blocks=1, vae_ch=32)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=("segmentation", "depth"), default="segmentation")
    parser.add_argument("--device-ms", default="0,2,4,8", help="of the stand-in, for an image")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--chart", type=Path)
    options = parser.parse_args()
    photo, labels, depth = scene()
    segmentation = options.task == "segmentation"
    config = VPDConfig(task=options.task, num_classes=150, channels=32, backbone=LEAST)
    predictor = make_predictor(VPD.empty(config).to_empty(device="cpu"), batch_size=options.batch_size)
    answer = SegmentationResult(photo, labels, ADE20K_CLASSES) if segmentation else DepthResult(photo, depth, 10.0)
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "photo.jpg"
        Image.fromarray(photo).save(path, quality=92)
        pipeline.measure(predictor, answer, path, 0, "jpg", 20)  # caches
        for milliseconds in map(float, options.device_ms.split(",")):
            for overlay in ("none", "jpg"):
                found = [
                    pipeline.measure(predictor, answer, path, milliseconds, overlay, options.images)
                    for _ in range(ROUNDS)
                ]
                runs.append(sorted(found, key=lambda run: run.images_per_second)[ROUNDS // 2])
        by_stage = pipeline.stages(predictor, answer, path)
    print(pipeline.table(runs, by_stage))
    footer = f"{options.task}, {device_name('cpu')}, {len(os.sched_getaffinity(0))} cores, batch {options.batch_size}"
    print(f"\n{footer}; load {os.getloadavg()[0]:.1f} before")
    if options.json is not None:
        text = pipeline.as_json(runs, by_stage, {"about": footer})
        write_files({options.json: lambda path: path.write_text(text)})
    if options.chart is not None:
        figure = pipeline.chart(runs, by_stage, footer)
        write_files({options.chart: lambda path: plots.save(figure, path)})


if __name__ == "__main__":
    main()
