"""In which order "auto" asks implementations on a GPU; nothing here needs one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vpd_fast import ops
from vpd_fast.kernels import tables
from vpd_fast.ops import _choices
from vpd_fast.ops._choices import Shape, nearest
from vpd_fast.ops.packing import PackedWeight

NAMES = ("cpu", "triton", "cuda", "library", "reference")
H100 = tables.Gpu("NVIDIA H100 PCIe", (9, 0))
KEY = "int8 1x1/1"


def row(*sizes: int, **us: float) -> dict:
    return {"operator": "linear", "key": KEY, "sizes": list(sizes), "us": us}


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """All GPUs are H100, for which there is the table of an H200."""
    rows = [row(1000, 64, 64, cuda=1, triton=2), row(4000, 64, 64, library=1, unknown=2, cuda=3)]
    table = {"device": "NVIDIA H200", "capability": [9, 0], "choices": rows}
    (tmp_path / "nvidia-h200.json").write_text(json.dumps(table))
    monkeypatch.delenv(tables.VARIABLE, raising=False)
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    monkeypatch.setattr(tables, "gpu_of", lambda device: H100)
    _choices.forget()
    yield
    _choices.forget()


def order(*sizes: int, key: str = KEY, operator: str = "linear") -> _choices.Order:
    return _choices.order(operator, NAMES, torch.device("cuda", 0), Shape(key, sizes))


def test_the_fastest_is_asked_first_and_those_without_times_last() -> None:
    assert order(1000, 64, 64).names == ("cuda", "triton", "cpu", "library", "reference")
    assert order(4000, 64, 64).names == ("library", "cuda", "cpu", "triton", "reference")


def test_words() -> None:
    table = "nvidia-h200.json, which a NVIDIA H100 PCIe (compute capability 9.0) shares"
    assert order(900, 64, 64).by == f"{table}: linear {KEY} 1000x64x64 (cuda 1, triton 2 us)"
    assert order(100, 64, 64).by == f"the order of the list ({table} has nothing near linear {KEY} 100x64x64)"


@pytest.mark.parametrize(
    ("sizes", "first"),
    [
        ((500, 64, 64), "cuda"),
        ((499, 64, 64), "cpu"),
        ((1999, 64, 64), "cuda"),
        ((2001, 64, 64), "library"),
        ((2000, 64, 64), "cuda"),  # as near to both: the smaller
        ((8000, 64, 64), "library"),
        ((8001, 64, 64), "cpu"),
        ((4000, 64, 96), "library"),
        ((5000, 80, 80), "library"),
        ((6000, 80, 80), "cpu"),  # each ratio is below 2, their product is not
        ((4000, 64), "cpu"),
        ((0, 64, 64), "cpu"),
    ],
)
def test_near_shapes(sizes: tuple[int, ...], first: str) -> None:
    assert order(*sizes).names[0] == first


def test_other_keys_and_operators_go_by_the_list() -> None:
    for found in (order(1000, 64, 64, key="fp8 1x1/1"), order(1000, 64, 64, operator="conv2d")):
        assert found.names == NAMES


def test_the_order_does_not_depend_on_that_of_the_file() -> None:
    times = [tables.Times((size,), {}) for size in (1000, 4000)]
    assert nearest((times[0], times[1]), (2000,)) is times[0]
    table = tables.read(tables.FOLDER / "nvidia-h200.json")
    (recorded,) = table.choices.values()
    assert [t.sizes for t in recorded] == sorted(t.sizes for t in recorded)


def test_a_table_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = order(1000, 64, 64)
    with monkeypatch.context() as patch:
        patch.setattr(tables, "of_device", None)
        assert order(1000, 64, 64) is first
    with monkeypatch.context() as patch:
        patch.setattr(tables, "read", None)
        assert order(4000, 64, 64).names[0] == "library"


def key_of(name: str, *args: object, **kwargs: object) -> Shape:
    op = ops.registry()[name]
    assert op.shape is not None
    return op.shape(op.bind(*args, **kwargs))


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def weight(n: int, k: int, matrices: int = 1) -> PackedWeight:
    return PackedWeight(empty(matrices, n, k), None, None, n, k)


def test_keys_of_products() -> None:
    """A key is what decides which program runs, sizes are those of the matrix product."""
    x = empty(2, 64, 32)
    assert key_of("linear", x, weight(48, 32)) == ("16-bit 1x1/1", (128, 48, 32))
    assert key_of("linear", x.half(), weight(48, 32)) == ("16-bit 1x1/1", (128, 48, 32))
    fused = key_of("linear", x, weight(64, 40), x2=empty(2, 64, 8), activation="geglu", residual=x)
    assert fused == ("16-bit 1x1/1 sources2 geglu residual", (128, 64, 40))
    image = empty(2, 8, 8, 32)
    expected = ("16-bit 3x3/2", (32, 48, 288))
    assert key_of("conv2d", image, weight(48, 288), kernel=(3, 3), stride=2, padding=1) == expected
    larger = key_of("conv2d", image, weight(48, 128, 4), kernel=(2, 2), upsample=True)
    assert larger == ("16-bit 2x2/1 enlarging", (512, 48, 128))


def test_keys_of_attention() -> None:
    q, k = empty(2, 64, 80), empty(2, 7, 80)
    assert key_of("self_attention", q, k, k, 2) == ("16-bit 40", (256, 7))
    assert key_of("cross_attention_maps", q, k, k, 2) == ("16-bit 2x40 maps", (128, 7))
    assert key_of("cross_attention_maps", q, k, k, 2, need_maps=False) == ("16-bit 2x40", (128, 7))
    assert key_of("cross_attention_maps", q, k, k, 2, average_heads=False).key == "16-bit 2x40 maps of heads"
    assert key_of("cross_attention_maps", q, k[:, :1], k[:, :1], 2).key == "16-bit 2x40 one token maps"
    into = empty(2, 64, 7, dtype=torch.float32)
    assert key_of("cross_attention_maps_into", q, k, k, into, 2) == ("16-bit 2x40 maps", (128, 7))
    assert ops.registry()["cross_attention_maps_into"].measured_as == "cross_attention_maps"
    ids = torch.empty(7, dtype=torch.int32, device="meta")
    categories = key_of("cross_attention_maps", q, k, k, 2, categories=ids, num_categories=3)
    assert categories.key == "16-bit 2x40 maps of categories"


def test_keys_of_labels() -> None:
    logits = empty(2, 5, 8, 8, dtype=torch.float32)
    assert key_of("upsample_argmax", logits, (64, 48)) == ("fp32 taps2", (5, 2 * 64 * 48))
    windows = key_of(
        "upsample_argmax_windows", logits[:, None].expand(-1, 2, -1, -1, -1), [0], [0, 8], crop_size=(16, 16),
        image_size=(16, 24),
    )  # fmt: skip
    assert windows == ("fp32 taps4", (5, 2 * 16 * 24))


def test_every_operator_with_several_implementations_on_gpus_has_keys() -> None:
    for name, op in ops.registry().items():
        on_gpu = {"triton", "cuda", "library", "sdpa"} & op.by_name.keys()
        assert (op.shape is not None) == (len(on_gpu) > 1), name
