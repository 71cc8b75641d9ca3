"""Models by the names of repositories, and models uploaded, against a small server that speaks the hub's API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants as constants
import pytest
import torch
from huggingface_hub import ModelCard

import vpd_fast
from vpd_fast import VPD, VPDConfig
from vpd_fast.checkpoints import convert, load_checkpoint
from vpd_fast.cli.main import run
from vpd_fast.errors import CheckpointError, InputError
from vpd_fast.hub.download import HubName
from vpd_fast.models.random_weights import randomize

from ..helpers.backbones import LEAST
from ..helpers.pages import example
from .server import COMMIT, Hub, serving

CONFIG = VPDConfig(num_classes=3, channels=32, base_size=128, backbone=LEAST, class_names=("a", "b", "c"))
NAME = "some/model"


@pytest.fixture(scope="module")
def model() -> VPD:
    return randomize(VPD(CONFIG), 0).eval()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """An empty hub, with a cache of its own, that answers where huggingface_hub asks."""
    with serving() as hub:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.address)
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
        monkeypatch.chdir(tmp_path)
        yield hub


@pytest.fixture(scope="module")
def files(model: VPD, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same(first: Any, second: Any) -> bool:
    second = second.state_dict()
    return all(torch.equal(x, second[key]) for key, x in first.state_dict().items())


def test_there_and_back(hub: Hub, model: VPD, tmp_path: Path) -> None:
    """Uploaded with a card, downloaded once, then found without network."""
    assert model.push_to_hub(NAME, metrics={"mIoU": 0.531}, dataset="ADE20K").endswith(f"{NAME}/commit/{COMMIT}")
    stored = hub.repositories[NAME]
    assert sorted(stored) == ["README.md", "config.json", "model.safetensors"]
    assert len(hub.objects) == 2  # config.json has many check sums
    (tmp_path / "README.md").write_bytes(stored["README.md"])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "image-segmentation"
    assert (card.data.eval_results[0].metric_type, card.data.eval_results[0].metric_value) == ("mIoU", 0.531)
    for text in (
        f'from_pretrained("{NAME}")',
        "3 class embeddings",
        "They are a, b, c",
        "| on ADE20K |",
        "| mIoU | 0.531 |",
    ):
        assert text in card.text, text

    hub.requests.clear()
    assert same(VPD.from_pretrained(NAME), model)
    assert sum("GET" in request and "safetensors" in request for request in hub.requests) == 1
    assert same(VPD.from_pretrained(f"{NAME}@main"), model)
    assert same(load_checkpoint(f"{NAME}/model.safetensors", revision="main"), model)
    assert sum("GET" in request and "safetensors" in request for request in hub.requests) == 1
    hub.requests.clear()
    assert same(VPD.from_pretrained(NAME, local_files_only=True), model)
    assert not hub.requests
    elsewhere = tmp_path / "elsewhere"
    assert same(VPD.from_pretrained(NAME, cache_dir=elsewhere), model)
    assert list(elsewhere.glob("models--some--model"))


def test_fast_models(hub: Hub, model: VPD, tmp_path: Path) -> None:
    fast = vpd_fast.optimize(model, "int8")
    fast.push_to_hub(NAME)
    assert f'vpd_fast.load_engine("{NAME}")  # int8' in hub.repositories[NAME]["README.md"].decode()
    images = torch.rand(1, 3, 128, 128)
    assert torch.equal(vpd_fast.load_engine(NAME)(images), fast(images))


def test_the_example_of_the_page(hub: Hub, model: VPD) -> None:
    found: dict[str, Any] = {"model": model}
    exec(example("hub.md", "push_to_hub"), found)
    assert same(found["model"], model)
    assert sorted(hub.repositories) == ["owner/name", "owner/name-int8"]
    assert found["fast"].precision == "int8"


def test_command_line(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    from PIL import Image

    hub.repositories[NAME] = files
    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    assert run(["predict", "image.png", "--checkpoint", NAME, "--mode", "whole", "-o", "out"]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["checkpoint"] == NAME


def test_stable_diffusion(hub: Hub, tmp_path: Path) -> None:
    randomize(VPD(CONFIG), 1).eval().save_pretrained(tmp_path / "vpd")
    convert(tmp_path / "vpd", tmp_path / "sd", to="diffusers")
    paths = [path for path in (tmp_path / "sd").rglob("*") if path.is_file()]
    hub.repositories["owner/sd"] = {p.relative_to(tmp_path / "sd").as_posix(): p.read_bytes() for p in paths}
    hub.repositories["owner/sd"] |= {"model_index.json": b"{}", "unet/diffusion_pytorch_model.fp16.safetensors": b"no"}
    made = VPD.from_stable_diffusion("owner/sd", CONFIG, class_embeddings=torch.ones(3, LEAST.context_dim))
    loaded = load_checkpoint(tmp_path / "vpd")
    assert torch.equal(
        made.unet.unet.diffusion_model.input_blocks[0][0].weight,
        loaded.unet.unet.diffusion_model.input_blocks[0][0].weight,
    )
    with pytest.raises(CheckpointError, match=r"owner/sd: holds no model of vpd_fast .*VPD.from_stable_diffusion"):
        VPD.from_pretrained("owner/sd")
    del hub.repositories["owner/sd"]["vae/config.json"]
    with pytest.raises(CheckpointError, match="owner/sd: lacks vae/config.json; expected a diffusers folder"):
        VPD.from_stable_diffusion("owner/sd", CONFIG, cache_dir=tmp_path / "other")


FAULTS = [
    ((403, "GatedRepo"), r"some/model: is gated; accept its conditions .* token \(token=, HF_TOKEN\)"),
    ((401, "RepoNotFound"), "some/model: is neither a file or folder here nor a repository of the hub; for a private"),
    ((404, "RepoNotFound"), "some/model: is neither a file or folder here nor a repository of the hub"),
    ((500, ""), "some/model: is neither a file or folder here nor in the hub's cache, and the hub cannot be reached"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS)
def test_what_the_hub_refuses(hub: Hub, files: dict[str, bytes], fault: tuple[int, str], message: str) -> None:
    hub.repositories[NAME] = files
    hub.faults[NAME] = fault
    with pytest.raises(CheckpointError, match=message):
        VPD.from_pretrained(NAME)


def test_what_is_not_there(hub: Hub, files: dict[str, bytes]) -> None:
    hub.repositories[NAME] = {"pytorch_model.bin": b"x"}
    with pytest.raises(
        CheckpointError, match=r"holds no model of vpd_fast .*; a single file of it is called some/model/F"
    ):
        VPD.from_pretrained(NAME)
    with pytest.raises(CheckpointError, match="some/model: has no revision 'v2'"):
        VPD.from_pretrained(f"{NAME}@v2")
    with pytest.raises(InputError, match="has a revision in its name, and revision='v3' is another"):
        VPD.from_pretrained(f"{NAME}@v2", revision="v3")
    with pytest.raises(CheckpointError, match="some/model: has no file other.pth"):
        load_checkpoint(f"{NAME}/other.pth")
    with pytest.raises(
        CheckpointError, match=r"some/other: is neither a file .* cannot be reached .*; run once with net"
    ):
        VPD.from_pretrained("some/other", local_files_only=True)
    hub.repositories[NAME] = files | {"config.json": b'{"model_type": "bert"}'}
    with pytest.raises(CheckpointError, match="config.json"):
        VPD.from_pretrained(NAME)


def test_slow_and_broken_connections(hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[NAME] = files
    hub.cut = 100
    with pytest.raises(CheckpointError, match=f"^{NAME}: "):
        VPD.from_pretrained(NAME)
    hub.cut = None
    assert same(VPD.from_pretrained(NAME), VPD.from_pretrained(NAME))


def test_uploads_that_are_refused(hub: Hub, model: VPD) -> None:
    hub.token = "right"
    with pytest.raises(CheckpointError, match=f"{NAME}: .*token"):
        model.push_to_hub(NAME, token="wrong")
    assert NAME not in hub.repositories
    assert model.push_to_hub(NAME, token="right")
    for name in ("model", "a/b/c.pth", "a/b@v1", 3):
        with pytest.raises(InputError, match="a repository of the hub is called owner/name, got"):
            model.push_to_hub(name)
    with pytest.raises(InputError, match="metrics must map names to finite numbers, got nan for 'mIoU'"):
        model.push_to_hub(NAME, metrics={"mIoU": float("nan")})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", HubName("owner/name")),
        ("owner/name@v1.0", HubName("owner/name", "v1.0")),
        ("owner/na.me-1/a b/file.ckpt", HubName("owner/na.me-1", None, "a b/file.ckpt")),
        ("owner/name@v1/file.pth", HubName("owner/name", "v1", "file.pth")),
        ("owner/model.pth", None),  # a file that is not there
        ("owner/name/folder", None),
        ("here/name", None),  # a folder that is there
        ("/owner/name", None),
        (Path("owner/name"), HubName("owner/name")),
        ("./owner/name", None),
        ("../owner/name", None),
        ("owner/../name/x.pth", None),
        ("name", None),
        ("shapes-depth", None),
    ],
)
def test_names_and_paths(text: str, expected: HubName | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert HubName.of(text) == expected
