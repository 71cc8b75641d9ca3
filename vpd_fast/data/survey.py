"""What targets look like as a whole: classes that never occur, and the likely reason."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vpd_fast.data.sample import Dataset, failure, load_sample
from vpd_fast.errors import VPDFastError
from vpd_fast.labels import IGNORED

SURVEYED = 32  # samples
MOST_IGNORED = 0.95  # share of pixels from which on it is worth a note
MAX_NAMES = 5  # in a note
NEAR_PART = 20  # depths that all lie within this part of the range are worth a note


def label_notes(names: Sequence[str], labelled: np.ndarray, ignored: int) -> list[str]:
    """Return notes on classes without a pixel and on masks that are nearly all ignored.

    names: of the classes. labelled: their pixels, (classes,). ignored: pixels without a class.
    """
    total = int(labelled.sum()) + ignored
    notes = []
    missing = [name for name, count in zip(names, labelled, strict=True) if not count]
    if missing and total:
        shown = ", ".join(missing[:MAX_NAMES]) + (", ..." if len(missing) > MAX_NAMES else "")
        notes.append(f"{len(missing)} of {len(names)} classes have no pixel in the masks: {shown}")
    share = ignored / total if total else 0.0
    if ignored and missing == list(names[1:]):
        hint = "are these black and white masks?"
        if len(names) == 2:
            hint += (
                f" The folder data set's option binary takes everything but 0 for {names[1]!r} (--data-option "
                "binary=true, in training data.options.binary=true)"
            )
        notes.append(f"{share:.1%} of the pixels have the value {IGNORED}, which is ignored: {hint}")
    elif share >= MOST_IGNORED:
        notes.append(f"{share:.1%} of the pixels are ignored (the value {IGNORED}): is it a class in these masks?")
    return notes


def depth_notes(known: int, measured: int, farthest: float, low: float, high: float) -> list[str]:
    """Return a note if the known depths hardly lie in the range that is measured, as with another unit.

    known, measured: pixels with a depth, and those of them between `low` and `high` metres. farthest: depth, metres.
    """
    if not known:
        return []
    hint = (
        "are the files in another unit? The option depth_scale says how many make a metre (--data-option "
        "depth_scale=256, in training data.options.depth_scale=256)"
    )
    if 1 - measured / known >= MOST_IGNORED:
        return [f"{measured / known:.1%} of the known depths are between {low:g} and {high:g} metres: {hint}"]
    if farthest < high / NEAR_PART:
        return [f"the largest depth is {farthest:.3g} metres, where up to {high:g} are measured: {hint}"]
    return []


def survey(dataset: Dataset, max_depth: float, limit: int = SURVEYED) -> list[str]:
    """Return notes on the targets of samples spread over a data set, of which at most `limit` are read.

    max_depth: metres, of the model. Samples that cannot be read are counted.
    """
    indices = sorted({round(i) for i in np.linspace(0, len(dataset) - 1, min(limit, len(dataset)))})
    labelled, ignored = np.zeros(max(len(dataset.class_names), 1), np.int64), 0
    known = measured = empty = 0
    farthest = 0.0
    failed: list[str] = []
    for index in indices:
        sample = load_sample(dataset, index)
        if isinstance(sample, VPDFastError):
            failed.append(failure(dataset, index, sample)[1])
        elif dataset.task == "segmentation":
            counts = np.bincount(sample.target.ravel(), minlength=IGNORED + 1)
            labelled += counts[: len(labelled)]
            ignored += int(counts[IGNORED])
        elif dataset.task == "depth":
            known += int((sample.target > 0).sum())
            farthest = max(farthest, float(sample.target.max()))
            measured += int(((sample.target > 0) & (sample.target < max_depth)).sum())
        else:
            empty += not sample.target.any()
    notes = [f"{len(failed)} cannot be read; the first: {failed[0]}"] if failed else []
    if dataset.task == "segmentation" and dataset.class_names:
        notes += label_notes(dataset.class_names, labelled, ignored)
    elif dataset.task == "depth":
        notes += depth_notes(known, measured, farthest, 0, max_depth)
    elif empty:
        notes.append(f"{empty} have a mask without an object")
    return [f"of {len(indices)} samples looked at: {note}" for note in notes]
