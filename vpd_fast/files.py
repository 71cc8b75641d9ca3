"""Reading small files whatever wrote them, and writing files so that nothing half-written is ever found.

Names of files that are not UTF-8 are text here as everywhere in Python: each odd byte is a surrogate (the error handler
"surrogateescape"), and what was read from a list, a record or the command line opens the same file again.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import itertools
import json
import os
import re
import secrets
import socket
import stat
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vpd_fast.errors import InputError, brief
from vpd_fast.forks import Lock

# The two files of a model's folder, named as transformers and diffusers name theirs.
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
# Those of a fast model's folder.
ENGINE_WEIGHTS_NAME = "engine.safetensors"
ENGINE_NAME = "engine.json"
CHECKSUMS = "checksums"  # of the weights, an entry of either kind of settings: `vpd_fast.checkpoints.checksums`

MAX_SETTINGS = 2**24  # bytes of a JSON file of settings
MAX_DEPTH = 32  # of lists and objects inside each other in such a file
MAX_ITEMS = 2**21  # of its lists and objects together
MAX_FOREIGN_AGE = 24 * 3600  # seconds: older temporary files of other machines, which cannot be asked, are left over
_TEMPORARY = re.compile(r"\.(\d+)-([0-9a-f]{8})-[0-9a-f]{16}\.tmp")
_cleaned: set[str] = set()  # folders
_cleaned_lock = Lock()
_BYTES_OF_NAMES = "surrogateescape"
# UTF-32 first: its mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

Writer = Callable[[Path], object]


def as_path(value: object, name: str) -> Path:
    """Return the argument of that name as a path. Raises InputError for what no path can be."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or "\0" in text:
        raise InputError(f"{name} must be a path, a string or pathlib.Path, got {brief(value)}")
    return Path(text)


def require_regular(path: str | Path) -> None:
    """Raise OSError, with a reason, where the path is a pipe, a device or a socket: reading one may never end."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "it is a pipe, a device or a socket; expected a file", str(path))


def read_text(path: str | Path, *, names: bool = False) -> str:
    """Read a small text file: UTF-8, with or without a byte order mark, or UTF-16 or UTF-32 with one.

    names: it may hold names of files that are not UTF-8. Raises OSError (no file, or a pipe), UnicodeDecodeError.
    """
    require_regular(path)
    data = Path(path).read_bytes()
    encoding = _encoding(data[:4])
    text = data.decode(encoding, _errors(encoding, names))
    return text.replace("\r\n", "\n").replace("\r", "\n")


def lines_of_names(file: IO[bytes]) -> Iterator[str]:
    """Yield the lines of a list of file names, which may come from a pipe, encoded as `read_text` says."""
    peek = getattr(file, "peek", None)  # of whatever is buffered
    encoding = _encoding(b"" if peek is None else peek(4)[:4])
    text = io.TextIOWrapper(file, encoding, _errors(encoding, names=True))
    try:
        yield from text
    finally:
        text.detach()  # standard input stays open


def _encoding(head: bytes) -> str:
    return next((encoding for mark, encoding in _MARKS if head.startswith(mark)), "utf-8-sig")


def _errors(encoding: str, names: bool) -> str:
    return _BYTES_OF_NAMES if names and encoding == "utf-8-sig" else "strict"


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 under this very name, names of files as the bytes they are; `write_files` makes that safe."""
    try:
        data = text.encode("utf-8", _BYTES_OF_NAMES)
    except UnicodeEncodeError:  # half a character that no file name has
        data = text.encode("utf-8", "backslashreplace")
    path.write_bytes(data)


def parse_json(text: str) -> Any:
    """Parse JSON of settings. Raises ValueError, also for NaN and infinities and for lists in lists without end."""
    try:
        value = json.loads(text.removeprefix("\ufeff"), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError(f"lists inside lists more than {MAX_DEPTH} deep") from None
    check_size(value)
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON, and no setting")


def check_size(value: Any) -> None:
    """Raise ValueError for settings nested without end, or so large when shared parts are counted each time."""
    layer, depth, items = [value], 0, 0
    while layer:
        items += len(layer)
        if depth > MAX_DEPTH or items > MAX_ITEMS:
            raise ValueError(f"lists inside lists more than {MAX_DEPTH} deep, or more than {MAX_ITEMS} values")
        inner: list[Any] = []
        for item in layer:
            if len(inner) > MAX_ITEMS:
                break
            inner += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        layer, depth = inner, depth + 1


def read_json(path: str | Path) -> Any:
    """Read a JSON file of settings. Raises OSError and ValueError, both with the reason."""
    require_regular(path)
    size = os.stat(path).st_size
    if size > MAX_SETTINGS:
        raise ValueError(f"it has {size} bytes; settings have at most {MAX_SETTINGS}")
    return parse_json(read_text(path))


def read_json_object(path: str | Path) -> dict[str, Any]:
    """Read a JSON file of settings that is an object. Raises OSError and ValueError."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {brief(value)}")
    return value


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights, or the index of its shards, in the folder of a network; variant: "fp16" and the like."""

    path: Path
    variant: str | None

    @property
    def is_safetensors(self) -> bool:
        """Whether it is not one of torch.save."""
        return ".safetensors" in self.path.name


def find_weights(folder: Path, stem: str) -> WeightsFile | None:
    """Return the weights that diffusers or transformers wrote into a folder, None where there are none.

    Full precision comes first, then fp16 and any other variant; of each safetensors before files of torch.save, whole
    before in shards. stem: "diffusion_pytorch_model" or "model", which transformers calls pytorch_model in .bin files.
    """
    stems = (stem, f"pytorch_{stem}")
    known = re.compile(rf"({'|'.join(stems)})\.(?:(safetensors|bin)\.index\.)?(\w+)\.(safetensors|bin|json)")
    others = {m[3] for path in folder.iterdir() if (m := known.fullmatch(path.name))} if folder.is_dir() else set()
    variants = ("", "fp16", *sorted(others - {"fp16", "index"}))
    for variant, suffix in itertools.product(variants, ("safetensors", "bin")):
        middle = variant and f"{variant}."
        for name in stems:
            for path in (folder / f"{name}.{middle}{suffix}", folder / f"{name}.{suffix}.index.{middle}json"):
                if path.is_file():
                    return WeightsFile(path, variant or None)
    return None


def temporary_path(path: Path) -> Path:
    """Return a hidden name beside `path` that no other process has: short, as names near the system's limit have no
    room for more, and with the process that it belongs to, by which leftovers are known."""
    return path.with_name(f".{os.getpid()}-{_machine()}-{secrets.token_hex(8)}.tmp")


def is_abandoned(path: Path) -> bool:
    """Return whether a name is that of a temporary file whose process has ended; one of another machine after a day."""
    match = _TEMPORARY.fullmatch(path.name)
    if match is None:
        return False
    if match[2] == _machine():
        return not process_exists(int(match[1]))
    try:
        return time.time() - path.stat().st_mtime > MAX_FOREIGN_AGE
    except OSError:
        return False


def process_exists(pid: int) -> bool:
    """Return whether this machine has a process of that number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # one of another user
        return True
    return True


def _machine() -> str:
    """Return what stands for this machine, or a container with process numbers of its own."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{zlib.crc32(f'{socket.gethostname()} {namespace}'.encode()):08x}"


def _clean_once(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder, when this process first writes there."""
    key = os.path.abspath(folder)
    with _cleaned_lock:
        if key in _cleaned:
            return
        _cleaned.add(key)
    with contextlib.suppress(OSError):
        for path in folder.glob(".*.tmp"):
            if is_abandoned(path) and not path.is_dir():
                path.unlink(missing_ok=True)


def write_files(writers: Mapping[Path, Writer], error: type[Exception] | None = None) -> None:
    """Call every writer with a temporary name beside its file, then put all files in place.

    Folders are made, and what killed processes left half-written there is removed. Whatever a writer raises is passed
    on, or becomes one `error` that names the first file; then the temporary files are removed and no existing file has
    changed. OSError where a file cannot be put in place, which is tried only when all are written.
    """
    temporary: dict[Path, Path] = {}
    try:
        for path, write in writers.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            _clean_once(path.parent)
            if path.is_dir():
                raise IsADirectoryError(f"{path} is a folder, expected a file name")
            temporary[path] = temporary_path(path)
            write(temporary[path])
        for path in writers:
            os.replace(temporary[path], path)
    except Exception as cause:  # torch and safetensors report a full disk as errors of their own
        if error is None:
            raise
        raise error(f"{next(iter(writers))}: cannot be written ({cause})") from cause
    finally:
        for left in temporary.values():
            with contextlib.suppress(OSError):
                left.unlink(missing_ok=True)


_FULL = (errno.ENOSPC, errno.EDQUOT)
_BROKEN = (errno.EROFS, errno.EIO)
# What torch, safetensors and NumPy say of a full disk where they keep no error number.
_FULL_TEXTS = re.compile(r"No space left|\d+ requested and \d+ written|failed writing file|file write failed")


def is_full_disk(error: BaseException) -> bool:
    """Return whether an error, or what caused it, says that the disk is full."""
    return any(getattr(e, "errno", None) in _FULL or _FULL_TEXTS.search(str(e)) for e in _with_causes(error))


def ends_writing(error: BaseException) -> bool:
    """Return whether an error, or what caused it, says that the disk is full, broken or read-only."""
    return is_full_disk(error) or any(getattr(e, "errno", None) in _BROKEN for e in _with_causes(error))


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def json_text(values: Mapping[str, Any]) -> str:
    """Return a JSON object as it is written to files."""
    return json.dumps(values, indent=2) + "\n"


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object under this very name; `write_files` makes that safe."""
    path.write_text(json_text(values), encoding="utf-8")
