"""Tar shards in, tar or Parquet shards out, so that a million images need no million files.

A shard is a tar file as webdataset has it: members key.jpg, key.json and so on are a sample. It lies anywhere that
fsspec reads: on the disk, s3://, gs://, https://, memory://. Each gives one shard of results, which has its name only
when it is complete, so that a run goes on shard by shard.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

from PIL import Image

from vpd_fast.errors import ImageError, InputError, MissingDependencyError
from vpd_fast.files import write_files
from vpd_fast.inference.batching import BatchPredictor
from vpd_fast.inference.pipeline import Failure, outcomes
from vpd_fast.inference.predict_images import READERS, image_error, model_error, together
from vpd_fast.inference.records import Record, Sink
from vpd_fast.inference.results import save_picture
from vpd_fast.pictures import IMAGE_SUFFIXES
from vpd_fast.pictures.reading import read_image

OUTPUTS = ("tar", "parquet")
TRIES, FIRST_WAIT = 3, 1.0  # of a shard that cannot be read: times, and seconds before the second, doubled after
ROWS = 256  # of a Parquet file are written together


class Sample(NamedTuple):
    """An image of a shard: its key, its bytes, or why there are none."""

    key: str
    data: bytes | ImageError


def is_shard(name: str) -> bool:
    """Return whether a name is that of a tar file, also of several as webdataset writes them, "{000..099}.tar"."""
    return name.lower().endswith((".tar", ".tar.gz", ".tgz"))


def _need(module: str) -> Any:
    try:
        return __import__(module)
    except ImportError as error:
        raise MissingDependencyError(f'shards need {module} ({error}); pip install "vpd_fast[scale]"') from error


def list_shards(names: Iterable[str]) -> list[str]:
    """Return paths and addresses of shards: braces are expanded, globs looked up where the file system can.

    Raises InputError for a glob without a match, and for two shards of one name, whose results would have one, too.
    """
    _need("webdataset")
    from braceexpand import braceexpand

    fsspec, found = _need("fsspec"), []
    for name in (expanded for given in names for expanded in braceexpand(given)):
        if any(mark in name for mark in "*?["):
            files, pattern = fsspec.core.url_to_fs(name)
            matches = [files.unstrip_protocol(path) if "://" in name else path for path in sorted(files.glob(pattern))]
            if not matches:
                raise InputError(f"{name} matches no shard")
            found += matches
        else:
            found.append(name)
    stems = [_stem(name) for name in found]
    if twice := next((stem for stem in stems if stems.count(stem) > 1), None):
        raise InputError(f"two shards are called {twice}, and so would be their results; predict on them one by one")
    return found


def _stem(name: str) -> str:
    return PurePosixPath(name.partition("://")[2] or name).name.partition(".")[0]


def samples(name: str, damage: list[str]) -> Generator[Sample, None, None]:
    """Yield the images of a shard as they come. damage: gets what is wrong with the shard itself.

    A key that comes again, and one without image, are a Sample with an ImageError. Raises OSError where there is none.
    """
    fsspec, _ = _need("fsspec"), _need("webdataset")
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    def members(file: Any) -> Iterator[dict[str, Any]]:
        try:
            for member in tar_file_iterator(file):
                yield {**member, "__url__": name}
        except (tarfile.TarError, EOFError) as error:
            damage.append(f"{name} is cut off or damaged ({error})")

    def note(error: Exception) -> bool:
        damage.append(f"{name}: {str(error.args[0]).partition(' dict_keys')[0]}")
        return True

    seen: set[str] = set()
    with fsspec.open(name, "rb") as file:
        for sample in group_by_keys(members(file), handler=note):
            key = sample["__key__"]
            images = [end for end in sample if f".{end.rpartition('.')[2]}" in IMAGE_SUFFIXES]
            if key in seen:
                yield Sample(key, ImageError(f"{key}: is in {name} twice; the first one counts"))
            elif not images:
                kinds = ", ".join(end for end in sample if not end.startswith("__"))
                yield Sample(key, ImageError(f"{key}: has no image in {name}, only {kinds}"))
            else:
                yield Sample(key, sample[images[0]])
            seen.add(key)


def predict_shards(
    predictor: BatchPredictor[Any],
    names: Sequence[str],
    output: str | Path,
    sink: Sink,
    *,
    to: str = "tar",
    overlay: str = "none",
    prefetch: int = 8,
    upload: str | None = None,
) -> Iterator[Record]:
    """Predict on the images of shards, and yield a record per shard, {"image": its name, "images", "failed", "files"}.

    predictor: of `make_predictor`. output: a folder. to: "tar", with members key.png, key.json and, unless `overlay` is
    "none", key.overlay.jpg; or "parquet", with columns key, json and files (what comes after the key, to bytes).
    upload: an address that fsspec writes to, such as "s3://bucket/results"; complete shards of results are moved there,
    and the record has "uploaded" instead of files.
    Shards that are done are skipped (`sink.skipped`). An image that cannot be predicted on has {"error"} in its json.
    A shard that is cut off or cannot be read has "error" in its record, with the results of what was read kept; a
    resumed run takes it again. It is tried three times unless it is not there. Raises InputError; ImageError where
    results cannot be written; ModelError.
    """
    if to not in OUTPUTS:
        raise InputError(f"shards are written as {' or '.join(OUTPUTS)}, got {to!r}")
    if to == "parquet":
        _need("pyarrow")
    if upload is not None:
        check_upload(upload)
    for name in names:
        if sink.is_done(name):
            sink.skipped += 1
            continue
        record = _predicted(predictor, name, Path(output), to, overlay, prefetch)
        if upload is not None and record.get("files"):
            record |= {"files": [], "uploaded": _uploaded(Path(output) / record["files"][0], upload)}
        sink.add(record)
        yield record


def _predicted(predictor: BatchPredictor[Any], name: str, output: Path, to: str, overlay: str, prefetch: int) -> Record:
    """Predict on one shard, with a few tries."""
    path = output / f"{_stem(name)}.{to}"
    for attempt in range(1, TRIES + 1):
        counts = {"images": 0, "failed": 0}
        damage: list[str] = []
        try:
            write = partial(
                _write, predictor, name, to=to, overlay=overlay, prefetch=prefetch, counts=counts, damage=damage
            )
            write_files({path: write})
        except Failure as failure:
            raise model_error(failure.cause, together([item.key for item in failure.items])) from failure.cause
        except _Unreadable as unreadable:
            error = unreadable.args[0]
            # Of a web server fsspec tells 404 and 503 alike.
            gone = isinstance(error, FileNotFoundError) and not name.startswith("http")
            if gone or attempt == TRIES:
                return {"image": name, "error": f"{name}: cannot be read ({type(error).__name__}: {error})"}
            time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
            continue
        except OSError as error:
            raise ImageError(f"{path}: cannot be written ({error.strerror or error})") from error
        record: Record = {"image": name, **counts, "files": [path.name]}
        return record | {"error": "; ".join(damage)} if damage else record
    raise AssertionError("unreachable")


def check_upload(address: str) -> None:
    """Raise InputError unless fsspec knows the file system of an address, and has what it needs for it."""
    try:
        _need("fsspec").core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise InputError(f"results cannot be uploaded to {address}: {error}") from error


def _uploaded(path: Path, address: str) -> str:
    """Move a file to an address, with a few tries. Returns where it is. Raises ImageError; the file is then kept."""
    target = f"{address.rstrip('/')}/{path.name}"
    for attempt in range(1, TRIES + 1):
        try:
            files, place = _need("fsspec").core.url_to_fs(target)
            files.makedirs(place.rpartition("/")[0], exist_ok=True)
            files.put_file(str(path), place)
            break
        except Exception as error:  # of any file system and network
            if attempt == TRIES:
                reason = f"{type(error).__name__}: {error}"
                raise ImageError(f"{target}: cannot be written ({reason}); {path} has the results") from error
            time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
    path.unlink()
    return target


class _Unreadable(Exception):
    """A shard cannot be read, now or at all."""


def _write(
    predictor: BatchPredictor[Any], name: str, path: Path, *, to: str, overlay: str, prefetch: int,
    counts: dict[str, int], damage: list[str],
) -> None:  # fmt: skip
    """Predict on a shard's images and write their results."""

    def read(sample: Sample) -> Any:
        try:
            if isinstance(sample.data, ImageError):
                return sample.data
            return predictor.prepare(read_image(Image.open(io.BytesIO(sample.data)), sample.key))
        except Exception as error:
            return image_error(error, sample.key, "cannot be read")

    def listed() -> Iterator[Sample]:
        try:
            yield from samples(name, damage)
        except Exception as error:  # of any file system and network
            if isinstance(error, MissingDependencyError):
                raise
            raise _Unreadable(error) from error

    found = outcomes(listed(), read, predictor, ahead=prefetch, threads=min(prefetch, READERS))
    with closing(found), _writer(path, to) as writer, tempfile.TemporaryDirectory(prefix="vpd-fast-") as scratch:
        for outcome in found:
            counts["images"] += 1
            files: dict[str, bytes] = {}
            if isinstance(outcome.result, Exception):
                counts["failed"] += 1
                record: Record = {"error": str(outcome.result)}
            else:
                record = outcome.result.record()  # pyright: ignore[reportOptionalMemberAccess]
                files = _files(outcome.result, Path(scratch), overlay)
            writer.add(outcome.item.key, record, files)


def _files(result: Any, scratch: Path, overlay: str) -> dict[str, bytes]:
    """The files of a result, by what comes after the key."""
    written = {f"{path.stem[1:].replace('_', '.')}.png".lstrip("."): path for path in result.save(scratch / "x.png")}
    if overlay != "none":
        written[f"overlay.{overlay}"] = save_picture(result.overlay(), scratch / f"overlay.{overlay}")
    return {end: path.read_bytes() for end, path in written.items()}


class _ShardWriter(Protocol):
    """What results are written with."""

    def add(self, key: str, record: Record, files: dict[str, bytes]) -> None: ...


@contextmanager
def _writer(path: Path, to: str) -> Iterator[_ShardWriter]:
    if to == "tar":
        from webdataset.writer import TarWriter

        with path.open("wb") as file, closing(TarWriter(file, encoder=False)) as tar:
            yield _Tar(tar)
    else:
        with closing(_Parquet(path)) as table:
            yield table


class _Tar:
    """Members key.json, key.png, ..."""

    def __init__(self, tar: Any) -> None:
        self._tar = tar

    def add(self, key: str, record: Record, files: dict[str, bytes]) -> None:
        """Write a sample."""
        self._tar.write({"__key__": key, "json": json.dumps(record).encode(), **files})


class _Parquet:
    """Columns key, json, and files: what comes after the key to the bytes."""

    def __init__(self, path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        self._arrow, self._rows = pyarrow, []
        binary = pyarrow.map_(pyarrow.string(), pyarrow.binary())
        self._schema = pyarrow.schema({"key": pyarrow.string(), "json": pyarrow.string(), "files": binary})
        self._file = pyarrow.parquet.ParquetWriter(path, self._schema)

    def add(self, key: str, record: Record, files: dict[str, bytes]) -> None:
        """Write a row."""
        self._rows.append({"key": key, "json": json.dumps(record), "files": list(files.items())})
        if len(self._rows) == ROWS:
            self._flush()

    def _flush(self) -> None:
        self._file.write_table(self._arrow.Table.from_pylist(self._rows, self._schema))
        self._rows = []

    def close(self) -> None:
        """Write what is left."""
        self._flush()
        self._file.close()
