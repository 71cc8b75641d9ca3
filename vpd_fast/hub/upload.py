"""Models onto the hub, with their cards."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from vpd_fast.config import VPDConfig
from vpd_fast.errors import InputError
from vpd_fast.hub.download import NAME, HubName, errors_of_the_hub
from vpd_fast.hub.model_card import model_card


def push(
    name: str,
    save: Callable[[Path], object],
    config: VPDConfig,
    *,
    precision: str | None = None,
    metrics: Mapping[str, float] | None = None,
    dataset: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    message: str = "Upload a model of vpd_fast",
) -> str:
    """Upload what `save` writes into a folder, with a model card, to a repository that is made if need be.

    metrics, dataset: what the card says of its accuracy, such as {"mIoU": 0.53} on "ADE20K". precision: a fast model's.
    Returns the address of the commit. Raises InputError for a wrong name or metric, CheckpointError where the hub
    refuses; then the repository has what it had.
    """
    found = NAME.fullmatch(name) if isinstance(name, str) else None
    if found is None or found["file"] or found["revision"]:
        raise InputError(f"a repository of the hub is called owner/name, got {name!r}")
    with tempfile.TemporaryDirectory(prefix="vpd-fast-") as scratch:
        folder = Path(scratch)
        card = model_card(name, config, precision, metrics or {}, dataset)
        save(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        with errors_of_the_hub(HubName(name), revision):
            from huggingface_hub import HfApi

            api = HfApi(token=token)
            api.create_repo(name, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(name, branch=revision, exist_ok=True)
            done = api.upload_folder(repo_id=name, folder_path=folder, revision=revision, commit_message=message)
    return done.commit_url
