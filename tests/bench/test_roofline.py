"""benchmarks/roofline.py: it counts what the code computes, and floors are those of the slowest resource."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import vpd_fast
from vpd_fast import VPD, VPDConfig
from vpd_fast.bench import operations, peaks
from vpd_fast.engine.model import FastVPD
from vpd_fast.engine.policy import PRECISIONS
from vpd_fast.models.random_weights import randomize

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MEASURED = BENCHMARKS / "results" / "amd-epyc-avx512-bf16" / "layers.json"


OTHER_TASKS = (("segmentation", "cpu"), ("referring", "cuda"), ("depth", "cpu"))


@functools.cache
def engine(precision: str, kind: str) -> FastVPD:
    return operations.empty_engine(VPDConfig(), precision, kind)


@functools.cache
def traced(precision: str, kind: str = "cuda", batch: int = 1, side: int = 512, **options) -> list:
    """The operations of segmentation at full size."""
    images = torch.empty(batch, 3, side, side, device="meta")
    make = engine.__wrapped__ if options.get("first") else engine  # one that has seen no text
    return operations.trace(make(precision, kind), images, **options)


def gflop(found: list, of: Callable[..., bool] = lambda _: True) -> float:
    return sum(operation.made for operation in found if of(operation.label.name))


def test_the_rewrites_explain_what_a_plain_model_computes_more() -> None:
    """1943 GFLOP as PyTorch counts the plain model's, 1895.5 of the engine: each rewrite saves what its sizes say."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        VPD.empty(VPDConfig()).eval()(torch.empty(1, 3, 512, 512, device="meta"))
    plain = counter.get_total_flops() / 1e9
    found = traced("bf16")
    assert plain == pytest.approx(1943, abs=1.5)
    assert gflop(found) == pytest.approx(1895.5, abs=0.5)

    positions, channels, tokens = 64 * 64, 512, 150
    upsampled = ((640, 64), (1280, 32), (1280, 16))  # channels and side of each enlarging convolution
    transformers = {320: 5, 640: 5, 1280: 6}  # width: how many
    embedding = 1280
    blocks = (320,) * 2 + (640,) * 2 + (1280,) * 4 + (1280,) * 2 + (1280,) * 6 + (640,) * 3 + (320,) * 3
    saved = {
        "enlarging: 4 of 9 products remain": sum(2 * 9 * c * c * s * s * 5 / 9 for c, s in upsampled),
        "keys and values of a known text": sum(n * 2 * tokens * 768 * 2 * width for width, n in transformers.items()),
        "two of the encoder's attention projections": 2 * 2 * positions * channels**2,
        "log-variances": 2 * positions * 9 * channels * 4,
        "quant_conv": 2 * positions * 8 * 8,
        "time": 2 * (320 * embedding + embedding**2 + embedding * sum(blocks)),
    }
    assert plain - gflop(found) == pytest.approx(sum(saved.values()) / 1e9, rel=1e-3)
    first = traced("bf16", first=True)
    assert gflop(first) - gflop(found) == pytest.approx(saved["keys and values of a known text"] / 1e9)


@pytest.mark.parametrize(("precision", "bytes_each", "in_and_out"), [("fp32", 4, 4), ("bf16", 2, 2), ("int8", 1, 2)])
def test_bytes_of_a_layer(precision: str, bytes_each: int, in_and_out: int) -> None:
    found = {o.label.name: o for o in traced(precision)}
    qkv = found["unet.input_blocks.1.1.attn1.qkv"]  # 320 to 960 channels at 64x64; a bias, from the layer norm
    assert (qkv.label.kind, qkv.label.side, qkv.label.precision) == ("linear", 64, precision)
    assert qkv.made == qkv.gflop == pytest.approx(2 * 4096 * 320 * 960 / 1e9)
    scales = 2 * 960 * 4 if precision == "int8" else 0
    assert qkv.weights == pytest.approx((320 * 960 * bytes_each + scales) / 1e6)
    assert qkv.read == pytest.approx((4096 * 320 * in_and_out + 960 * 4) / 1e6)
    assert qkv.written == pytest.approx(4096 * 960 * in_and_out / 1e6)
    # Self-attention reads all of that and writes a third of it. The encoder's has one tensor for keys and values.
    attention = found["unet self-attention at 64"]
    assert attention.read == pytest.approx(qkv.written)
    assert attention.written == pytest.approx(qkv.written / 3)
    assert attention.gexp == pytest.approx(8 * 4096**2 / 1e9)
    assert found["encoder self-attention at 64"].read == pytest.approx(2 * 4096 * 512 * in_and_out / 1e6)


def test_batches_share_weights() -> None:
    one, eight = (traced("bf16", batch=b) for b in (1, 8))
    assert gflop(eight, lambda name: "unet" in name) == pytest.approx(8 * gflop(one, lambda name: "unet" in name))
    assert sum(o.weights for o in eight) == pytest.approx(sum(o.weights for o in one))


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        *(("segmentation", "cuda"), ("referring", "cpu"), ("depth", "cuda")),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHER_TASKS),
    ],
)
def test_tensors_with_and_without_memory_count_the_same(
    script, monkeypatch, tiny_backbone, task: str, kind: str
) -> None:
    """The list of a model that is there is the list of the one without memory."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # PyTorch's reference is faster than interpreted kernels
    policy = vpd_fast.engine.Policy(winograd=kind == "cpu")
    config = VPDConfig(task=task, base_size=64, channels=32, backbone=tiny_backbone)
    model = vpd_fast.optimize(randomize(VPD(config), seed=0).eval(), "int8", policy=policy)
    model._workspaces = operations.workspaces(model.device, kind)
    real = operations.trace(model, torch.zeros(2, 3, 64, 64))
    empty = operations.trace(operations.empty_engine(config, "int8", kind), torch.empty(2, 3, 64, 64, device="meta"))
    assert [o.label for o in real if o.label.kind != "glue"] == [o.label for o in empty if o.label.kind != "glue"]
    assert gflop(real) == pytest.approx(gflop(empty))
    for bytes_ in ("written", "read"):
        own, other = (sum(getattr(o, bytes_) for o in found) for found in (real, empty))
        assert own == pytest.approx(other, rel=1e-3)


def test_winograd_makes_fewer_products() -> None:
    small = traced("fp32", "cpu", side=256)
    found = {o.label.name: o for o in small}
    assert found["encoder.down.0.0.conv1"].made == pytest.approx(found["encoder.down.0.0.conv1"].gflop / 4)
    for kind, share in (("cpu", 1 / 4), ("cuda", 4 / 9)):
        enlarging = [o for o in traced("bf16", kind) if "enlarging" in o.label.part]
        assert len(enlarging) == 3
        for operation in enlarging:
            assert operation.made == pytest.approx(operation.gflop * share)


def test_floor(script) -> None:
    device = peaks.Device("d", "cuda", "", {"bf16": 1000.0, "fp32": 10.0}, gb_per_s=100.0, gexp_per_s=5.0)
    assert device.seconds("bf16", 2e12, 1e9) == (2.0, "products")
    assert device.seconds("fp32", 2e12, 1e9) == (200.0, "products")
    assert device.seconds("bf16", 1e9, 3e11) == (3.0, "bytes")
    assert device.seconds("bf16", 2e12, 1e9, 2e10) == (4.0, "exponentials")
    assert device.seconds("int8", 0, 1e11) == (1.0, "bytes")  # no products, no rate of them
    with pytest.raises(SystemExit, match="d has no rate for int8 products; it has those of bf16, fp32"):
        device.seconds("int8", 1.0, 1.0)


def test_realistic_rates_give_realistic_floors() -> None:
    """2.62 ms for a plain model's layers without norms, by hand; the engine makes 2.4 % fewer products."""
    device = peaks.DEVICES["h200-sustained"]
    found = [o for o in traced("bf16") if o.label.kind not in ("group norm", "glue")]
    found = [dataclasses.replace(o, gexp=0.0) for o in found]  # as counted by hand
    assert sum(o.floor(device)[0] for o in found) == pytest.approx(2.62 * 1895.5 / 1943, rel=0.02)


def test_results_and_picture(script, tmp_path: Path, capsys) -> None:
    script("roofline").main(["--device", "a100", "--precision", "bf16", "--size", "256", "--batch", "2",
                             "--json", str(tmp_path / "r.json"), "--png", str(tmp_path / "r.png")])  # fmt: skip
    assert "segmentation, bf16, 2x3x256x256:" in capsys.readouterr().out
    content = json.loads((tmp_path / "r.json").read_text())
    (result,) = content["results"]
    assert content["rows"] == [{"task": "segmentation", "precision": "bf16", "size": 256, "batch": 2} | row
                               for row in result["parts"]]  # fmt: skip
    for parts in (result["operations"], result["parts"], result["totals"]["stage"], result["totals"]["side"]):
        assert sum(row["floor_ms"] for row in parts) == pytest.approx(result["total"]["floor_ms"])
        assert sum(row["made_gflop"] for row in parts) == pytest.approx(result["total"]["made_gflop"])
    assert all(row["floor_ms"] > 0 and row["bound"] in ("bytes", "products", "exponentials") for row in result["parts"])
    with Image.open(tmp_path / "r.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.png"]


def test_measured_times_beside_the_floors(script, capsys) -> None:
    """Every part of the stored results is found, their sum is kept, and no measured time is below its floor."""
    script("roofline").main(["--device", str(MEASURED), "--precision", "int8"])
    assert "measured" in capsys.readouterr().out
    roofline, content = script("roofline"), json.loads(MEASURED.read_text())
    case = roofline.Case("segmentation", "int8", 512, 1)
    result = roofline.analyse(case, peaks.find(str(MEASURED)), content)
    stored = {(r["stage"], r["part"]): r for r in content["rows"] if r["precision"] == "int8" and r["size"] == 512}
    parts = {(r["stage"], r["part"]): r for r in result["parts"]}
    assert parts.keys() == stored.keys()
    assert result["total"]["ms"] == pytest.approx(sum(row["ms"] for row in stored.values()))
    for key, row in parts.items():
        if key != roofline.REST and "gflop" in stored[key]:
            assert (row["calls"], row["in"]) == (stored[key]["calls"], stored[key]["in"])
            assert row["gflop"] == pytest.approx(stored[key]["gflop"], abs=0.01)
            # A layer that beat the large product by a tenth would be counted wrongly.
            assert row["gap"] > 0.9
    assert math.isclose(result["total"]["gap"], result["total"]["ms"] / result["total"]["floor_ms"])


def test_what_is_planned_and_what_is_left_out(script) -> None:
    """Each planned step gains something, none that is left out as much as the least worth of a kernel; where nothing is
    predicted, there is nothing."""
    planned = script("planned")
    for precision in ("bf16", "int8"):
        assert all(row["gain_ms"] >= 0 for row in planned.steps(precision, 8, None))
        assert all(0 < row["gain_ms"] < 0.02 and row["why"] for row in planned.left_out(precision, 8))
    assert not planned.steps("fp32", 8, None) + planned.left_out("fp32", 8) + planned.left_out("bf16", 1)


def test_a_size_that_was_not_measured(script, capsys) -> None:
    script("roofline").main(["--device", str(MEASURED), "--precision", "bf16", "--size", "128"])
    assert "segmentation, bf16, 1x3x128x128: not measured in that file" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "h2000"], "h2000 is neither a known device (h200, h100, a100, rtx4090, h200-sustained) nor a"),
        (["--device", __file__], "nor a file of layers.py: JSONDecodeError"),
        (["--size", "500"], "--size must be a multiple of 64"),
        (["--batch", "0"], "--batch at least 1"),
    ],
)
def test_bad_arguments(script, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        script("roofline").main(arguments)
    assert message in str(stopped.value)


@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_every_precision_has_a_rate_on_the_newest_devices(script, precision: str) -> None:
    for name in ("h200", "h100", "rtx4090", "h200-sustained"):
        assert peaks.DEVICES[name].peak(precision) > 0
