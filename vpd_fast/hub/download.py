"""Names of the hub, "owner/name", "owner/name@revision" or "owner/name/file", and the files behind them.

What huggingface_hub does stays as users know it: its cache, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpd_fast.errors import CheckpointError, InputError, MissingDependencyError
from vpd_fast.files import CONFIG_NAME, ENGINE_NAME, ENGINE_WEIGHTS_NAME, WEIGHTS_NAME, as_path

FOLDERS = ((CONFIG_NAME, WEIGHTS_NAME), (ENGINE_NAME, ENGINE_WEIGHTS_NAME))  # of plain and of fast models
PIPELINE = "model_index.json"
MODEL_FILES = (*FOLDERS[0], *FOLDERS[1], PIPELINE)
STABLE_DIFFUSION_FILES = tuple(
    f"{part}/{name}" for part in ("unet", "vae") for name in (CONFIG_NAME, "diffusion_pytorch_model.safetensors")
)
WEIGHT_SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors", ".bin")
NAME = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w.-]+))?(?P<file>/[\w./ -]+)?")
LOG_IN = "log in (`hf auth login`) or give a token (token=, HF_TOKEN)"


@dataclass(frozen=True)
class HubName:
    """What a name stands for: a repository, a revision of it or None, and one of its files or None for all."""

    repository: str
    revision: str | None = None
    file: str | None = None

    @classmethod
    def of(cls, path: str | Path) -> HubName | None:
        """Return what a name stands for on the hub, None where it is a path.

        A path is what exists here, what is in a folder that exists, and two parts that end like a file of weights.
        """
        given = as_path(path, "path")
        text = path.replace("\\", "/") if isinstance(path, str) else given.as_posix()
        found = NAME.fullmatch(text)
        if found is None or Path(text).exists() or Path(text.partition("/")[0]).exists():
            return None
        file = found["file"] and found["file"].lstrip("/")
        last = file or found["repository"]
        if bool(file) != last.endswith(WEIGHT_SUFFIXES) or ".." in text.split("/"):
            return None
        return cls(found["repository"], found["revision"], file)


def local_path(
    path: str | Path,
    files: Sequence[str] = MODEL_FILES,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return the file or folder on this machine that a path or a name of the hub stands for, downloaded if need be.

    files: of a repository, those that are wanted. revision: a branch, tag or commit; token: True: the one stored by
    logging in; cache_dir: in place of the hub's own; local_files_only: what is in the cache, without network. They do
    nothing to paths. Raises CheckpointError, which says what to do, where there is neither, where the repository is
    gated or holds something else, or cannot be had; MissingDependencyError without huggingface_hub.
    """
    name = HubName.of(path)
    if name is None:
        return as_path(path, "path")
    if revision is not None and name.revision is not None:
        raise InputError(f"{path}: has a revision in its name, and revision={revision!r} is another; give one of them")
    revision = name.revision or revision
    options: dict[str, Any] = {
        "revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only,
    }  # fmt: skip
    with errors_of_the_hub(name, revision):
        import huggingface_hub

        if name.file is not None:
            return Path(huggingface_hub.hf_hub_download(name.repository, name.file, **options))
        folder = Path(huggingface_hub.snapshot_download(name.repository, allow_patterns=list(files), **options))
    _require_a_model(name, folder, files)
    return folder


def _require_a_model(name: HubName, folder: Path, files: Sequence[str]) -> None:
    """Raise CheckpointError unless the wanted files are there."""
    if tuple(files) != MODEL_FILES:
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            raise CheckpointError(f"{name.repository}: lacks {', '.join(missing)}; expected a diffusers folder of them")
        return
    if any(all((folder / file).is_file() for file in kind) for kind in FOLDERS):
        return
    expected = " or ".join(" with ".join(kind) for kind in FOLDERS)
    hint = (
        "it is a pipeline of diffusers, from which VPD.from_stable_diffusion starts a model"
        if (folder / PIPELINE).is_file()
        else f"a single file of it is called {name.repository}/FILE"
    )
    raise CheckpointError(f"{name.repository}: holds no model of vpd_fast ({expected}); {hint}")


@contextmanager
def errors_of_the_hub(name: HubName, revision: str | None) -> Iterator[None]:
    """What huggingface_hub and the network raise, as one error of ours that says what to do."""
    try:
        from huggingface_hub import errors
    except ImportError as error:
        raise MissingDependencyError(f"{name.repository}: the hub needs `pip install huggingface_hub`") from error
    repository = name.repository
    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repository}: is gated; accept its conditions on the hub's page of it, then {LOG_IN}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repository}: is neither a file or folder here nor a repository of the hub; for a private one {LOG_IN}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repository}: has no revision {revision!r}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{repository}: is neither a file or folder here nor in the hub's cache, and the hub cannot be reached "
            f"({_first_line(error)}); run once with network"
        ) from error
    except errors.EntryNotFoundError as error:
        raise CheckpointError(f"{repository}: has no file {name.file}") from error
    except Exception as error:  # the client's own, the file system's, and those of the HTTP library, which changes
        raise CheckpointError(
            f"{repository}: the hub refuses or breaks off ({_first_line(error)}); {LOG_IN}"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
