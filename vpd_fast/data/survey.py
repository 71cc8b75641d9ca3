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
    black_and_white = len(names) == 2 and ignored and missing == [names[1]]
    if black_and_white:
        notes.append(
            f"{share:.1%} of the pixels have the value {IGNORED}, which is ignored; in black and white masks it may "
            f"mean {names[1]!r}: the folder data set's option binary takes everything but 0 for it (--data-option "
            "binary=true, in training data.options.binary=true)"
        )
    elif share >= MOST_IGNORED:
        notes.append(f"{share:.1%} of the pixels are ignored (the value {IGNORED}): is it a class in these masks?")
    return notes


def depth_notes(known: int, measured: int, low: float, high: float) -> list[str]:
    """Return a note if hardly any known depth lies in the range that is measured, as with another unit.

    known, measured: pixels with a depth, and those of them between `low` and `high` metres.
    """
    if not known or 1 - measured / known < MOST_IGNORED:
        return []
    return [
        f"{measured / known:.1%} of the known depths are between {low:g} and {high:g} metres: are the files in another "
        "unit? The option depth_scale says how many make a metre (--data-option depth_scale=256, in training "
        "data.options.depth_scale=256)"
    ]


def survey(dataset: Dataset, max_depth: float, limit: int = SURVEYED) -> list[str]:
    """Return notes on the targets of samples spread over a data set, of which at most `limit` are read.

    max_depth: metres, of the model. Samples that cannot be read are counted.
    """
    indices = sorted({round(i) for i in np.linspace(0, len(dataset) - 1, min(limit, len(dataset)))})
    labelled, ignored = np.zeros(max(len(dataset.class_names), 1), np.int64), 0
    known = measured = empty = 0
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
            measured += int(((sample.target > 0) & (sample.target < max_depth)).sum())
        else:
            empty += not sample.target.any()
    notes = [f"{len(failed)} cannot be read; the first: {failed[0]}"] if failed else []
    if dataset.task == "segmentation" and dataset.class_names:
        notes += label_notes(dataset.class_names, labelled, ignored)
    elif dataset.task == "depth":
        notes += depth_notes(known, measured, 0, max_depth)
    elif empty:
        notes.append(f"{empty} have a mask without an object")
    return [f"of {len(indices)} samples looked at: {note}" for note in notes]
