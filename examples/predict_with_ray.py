"""Predict on a folder of images with a cluster of Ray workers, and store the results as Parquet.

    pip install "vpd_fast[ray]"
    python examples/predict_with_ray.py IMAGES CHECKPOINT OUTPUT --workers 4 --gpus 1 --precision int8

Every worker loads the model once. Without a cluster Ray starts its own on this machine.
"""

from __future__ import annotations

import argparse

import ray.data

from vpd_fast.inference.ray import predict_dataset


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="a folder, also of a bucket (s3://...)")
    parser.add_argument("checkpoint", help="what `vpd-fast predict --checkpoint` takes")
    parser.add_argument("output", help="a folder for Parquet files")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=0, help="of a worker")
    parser.add_argument("--precision", help="of the fast model (default: the plain model)")
    options = parser.parse_args()
    images = ray.data.read_images(options.images, include_paths=True, mode="RGB")
    results = predict_dataset(
        images, options.checkpoint, workers=options.workers, num_gpus=options.gpus, precision=options.precision
    )
    results.write_parquet(options.output)


if __name__ == "__main__":
    main()
