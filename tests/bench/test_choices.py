"""How times of implementations are measured and taken from stored results; times are made up, nothing needs a GPU."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from vpd_fast import ops
from vpd_fast.bench import choices, tuning
from vpd_fast.bench.choices import ImplementationTimes, OperatorCalls
from vpd_fast.bench.variants import Case
from vpd_fast.cli.main import run
from vpd_fast.errors import InputError
from vpd_fast.kernels import tables
from vpd_fast.ops.packing import PackedWeight

ROOT = Path(__file__).parents[2]
STORED = ROOT / "benchmarks" / "results" / "nvidia-h200" / "implementations.json"


def attention(out: torch.Tensor | None = None) -> torch.Tensor:
    q = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0))
    return ops.self_attention(q, q, q, 2, out=out)


def measuring(seconds: float = 60.0, known: dict | None = None, **microseconds: float) -> ImplementationTimes:
    """Times that are made up, in the order in which implementations are measured."""
    left = iter(microseconds.values())

    def measure(call) -> float:
        call()
        value = next(left)
        if value < 0:
            raise RuntimeError("cannot be captured")
        return value / 1e3

    return ImplementationTimes(known or {}, time.monotonic() + seconds, measure)


@pytest.fixture(autouse=True)
def _no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that "cpu" and "sdpa" are the candidates."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


KEY = ("self_attention", "fp32 4", (32, 16))


def test_all_implementations_are_measured_and_the_fastest_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    times, expected = measuring(cpu=3.0, sdpa=2.0), attention()
    out = torch.zeros(1, 16, 8)
    ran = []
    for name in ("cpu", "sdpa"):
        implementation = ops.registry()["self_attention"].by_name[name]
        inner = implementation.run
        monkeypatch.setitem(implementation.__dict__, "run", lambda a, n=name, f=inner: (ran.append(n), f(a))[1])
    with OperatorCalls(times.compute):
        attention(out)
        assert ran == ["cpu", "cpu", "sdpa", "sdpa", "sdpa"]  # to warm up, measured; the last is the result
        attention()
        ops.self_attention(*[out] * 3, 2, impl="cpu")  # is not left to "auto"
    assert ran[5:] == ["sdpa", "cpu"]
    assert times.found == {KEY: {"cpu": 3.0, "sdpa": 2.0}}
    torch.testing.assert_close(out, expected)


def test_memory_that_is_read_and_written_is_as_before() -> None:
    q, k = torch.randn(1, 16, 8), torch.randn(1, 3, 8)
    sums = torch.ones(1, 16, 3)
    expected = sums.clone()
    ops.cross_attention_maps_into(q, k, k, expected, 2, accumulate=True)
    times = ImplementationTimes({}, time.monotonic() + 60, lambda call: (call(), call(), 1.0)[2])
    cross = ops.registry()["cross_attention_maps_into"]
    with OperatorCalls(lambda op, arguments: (times._times(cross, arguments), times.compute(op, arguments))[1]):
        ops.cross_attention_maps_into(q, k, k, sums, 2, accumulate=True)
    torch.testing.assert_close(sums, expected)


def test_what_fails_is_no_candidate() -> None:
    times = measuring(cpu=-1.0, sdpa=2.0)
    with OperatorCalls(times.compute):
        attention()
    assert times.found == {KEY: {"sdpa": 2.0}}


def test_what_is_known_or_too_late_is_not_measured() -> None:
    for times, left_out in ((measuring(known={KEY: {"sdpa": 1.0}}), set()), (measuring(seconds=-1.0), {KEY})):
        with OperatorCalls(times.compute):
            torch.testing.assert_close(attention(), attention())
        assert (times.found, times.left_out) == ({}, left_out)


def test_tables_of_several_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later run keeps what the file has, and replaces what it measured itself."""
    pytest.importorskip("triton")
    monkeypatch.setattr(tuning, "environment", lambda device: {"device": "NVIDIA H200", "capability": [9, 0]})
    path, other = tmp_path / "t.json", ("linear", "int8 1x1/1", (64, 32, 32))

    def write(found: dict, fresh: bool) -> tables.Table:
        operators = measuring()
        operators.found = found
        tuning.TableFile(path, tuning.Measurements({}, 132, 0.0), operators, fresh).save()
        return tables.read(path)

    assert choices.known_times(write({KEY: {"cpu": 1.0}}, True)) == {KEY: {"cpu": 1.0}}
    merged = write({KEY: {"cpu": 3.0, "sdpa": 2.0}, other: {"cuda": 1.0}}, False)
    assert choices.known_times(merged) == {KEY: {"sdpa": 2.0, "cpu": 3.0}, other: {"cuda": 1.0}}
    assert (merged.gpu, merged.capability) == ("NVIDIA H200", (9, 0))
    assert choices.known_times(write({other: {"cuda": 1.0}}, True)).keys() == {other}


class Pass:
    """A pass of a model that calls two operators, one of them twice."""

    def __init__(self, *_: object, **__: object) -> None:
        self.weight = PackedWeight.pack(torch.randn(1, 8, 8), torch.float32)

    def prepare(self, case: Case) -> None:
        self.x = torch.zeros(case.batch, 16, 8)

    def run(self) -> None:
        out = ops.linear(self.x, self.weight)
        ops.linear(self.x, self.weight, out=out)
        ops.self_attention(out, out, out, 2)


@pytest.mark.parametrize("behind", [1.4, 1.6])
def test_implementations_are_measured_before_tiles(tmp_path: Path, monkeypatch, behind: float) -> None:
    """And tiles only where Triton's product is nearly the fastest; Triton's is made up here."""
    kernel_tuning = pytest.importorskip("vpd_fast.kernels.tuning")
    monkeypatch.setattr(tuning, "environment", lambda device: {"device": "a GPU", "capability": [9, 0]})
    monkeypatch.setattr(tuning.vpd_fast, "optimize", lambda model, precision: None)
    monkeypatch.setattr(tuning, "ModelVariant", Pass)
    monkeypatch.setattr(kernel_tuning, "to_rows", lambda found: [])
    linear = ops.registry()["linear"].by_name
    tiles, ran = tuning.Measurements({}, 132, 0.0), []

    def run_triton(arguments: object) -> None:
        ran.append("tiles" if kernel_tuning._tuning.measurer else "triton")
        if ran[-1] == "tiles":
            tiles.found["tile"] = []
        linear["cpu"].run(arguments)

    monkeypatch.setitem(linear["triton"].__dict__, "refuse", lambda _: None)
    monkeypatch.setitem(linear["triton"].__dict__, "run", run_triton)
    clock = iter([1.0, behind, 2.0, 3.0, 0.5])  # linear by cpu and triton, attention by cpu and sdpa, triton again
    operators = ImplementationTimes({}, time.monotonic() + 60, lambda call: (call(), next(clock) / 1e3)[1])
    file, lines = tuning.TableFile(tmp_path / "t.json", tiles, operators, True), []
    tuning.measure_models(file, None, ["fp32"], [Case(64)], lines.append)
    table = tables.read(tmp_path / "t.json")
    assert ran == ["triton", "triton", *([] if behind > 1.5 else ["tiles", "tiles", "triton", "triton"])]
    assert choices.known_times(table) == {
        ("linear", "fp32 1x1/1", (16, 8, 8)): {"cpu": 1.0, "triton": behind if behind > 1.5 else 0.5},
        KEY: {"cpu": 2.0, "sdpa": 3.0},
    }
    assert lines[0].startswith("implementations, fp32 1x3x64x64: 2 new entries in ")
    assert lines[1].startswith(f"tiles, fp32 1x3x64x64: {int(behind < 1.5)} new entries in ")
    assert not operators.left_out


# --- from stored results ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_table_of_the_package_is_what_the_stored_results_give(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    assert run(["tune", "--from", str(STORED), "--out", str(path)]) == 0
    assert path.read_text() == (tables.FOLDER / "nvidia-h200.json").read_text()


def test_the_table_of_the_package_has_the_operators_of_the_stored_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the test before, without tracing what the layers are."""
    monkeypatch.setattr(choices, "times_of_layers", lambda rows: ({}, {}))
    expected = choices.table_of_results([STORED])
    table = json.loads((tables.FOLDER / "nvidia-h200.json").read_text())
    assert [row for row in table["choices"] if row["source"] == STORED.name] == expected["choices"]
    assert len(expected["choices"]) == 18
    assert {**table, "choices": 0} == {**expected, "choices": 0}


def test_times_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part's mean time goes to each of its shapes; what an implementation refuses was computed by Triton."""
    all_three, no_cuda = frozenset({"triton", "cuda", "library"}), frozenset({"triton", "library"})
    a, b, c, d = (("linear", name, (1,)) for name in "abcd")
    shapes = {
        ("unet", "out", "bf16"): {a: all_three, b: all_three},
        ("unet", "q", "bf16"): {a: all_three},
        ("head", "in", "bf16"): {c: no_cuda},
        ("head", "0", "bf16"): {c: no_cuda, d: all_three},  # by two implementations
    }
    monkeypatch.setattr(choices, "shapes_of_parts", lambda *run: shapes if run == ("bf16", 512, 8, "full") else {})

    def row(stage: str, part: str, products: str, calls: int, ms: float) -> dict:
        facts = {"precision": "bf16", "size": 512, "batch": 8, "in": "bf16"}
        return {**facts, "stage": stage, "part": part, "products": products, "calls": calls, "ms": ms}

    rows = [row("unet", "out", "cuda", 2, 0.4), row("unet", "out", "triton", 2, 0.6), row("unet", "q", "cuda", 2, 0.2)]
    rows += [row("head", "in", "cuda", 1, 0.5), row("head", "in", "library", 1, 0.3), row("head", "0", "cuda", 1, 9)]
    rows.append({**rows[0], "precision": "fp8"})  # with nothing to compare with
    times, sources = choices.times_of_layers(rows)
    assert times == {
        a: {"cuda": pytest.approx(150.0), "triton": pytest.approx(300.0)},
        b: {"cuda": pytest.approx(200.0), "triton": pytest.approx(300.0)},
        c: {"triton": pytest.approx(500.0), "library": pytest.approx(300.0)},
    }
    assert sources[b] == "layers: unet out"


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"environment": {"device": "a"}}', '{"environment": {"device": "a", "capability": 9}}']
)
def test_files_that_are_no_results(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"r.json has no times of a GPU's layers or operators"):
        choices.table_of_results([path])


def test_files_of_two_gpus(tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in paths:
        path.write_text(json.dumps({"environment": {"device": path.stem, "capability": [9, 0]}}))
    with pytest.raises(InputError, match=r"b.json is of b, others are of a; give files of one GPU"):
        choices.table_of_results(paths)
    with pytest.raises(InputError, match="there are no files"):
        choices.table_of_results([])


MEASURED = {  # of the H200: what was fastest, by operator, heads x dimension, sizes
    ("cross_attention_maps", "16-bit 8x40 maps", (4096, 150)): "triton",
    ("cross_attention_maps", "16-bit 8x40 maps", (4096, 40)): "cuda",
    ("cross_attention_maps", "16-bit 8x40 maps", (32768, 150)): "cuda",
    ("cross_attention_maps", "16-bit 8x160 maps", (2048, 150)): "triton",
    ("self_attention", "16-bit 40", (8 * 8 * 4096, 4096)): "sdpa",
    ("self_attention", "16-bit 80", (8 * 8 * 1024, 1024)): "triton",
    ("upsample_argmax", "fp32 taps2", (150, 8 * 512 * 512)): "triton",
    ("conv2d", "16-bit 3x3/1 statistics", (32768, 320, 2880)): "library",
    ("conv2d", "int8 3x3/1 statistics", (32768, 320, 2880)): "cuda",
    ("linear", "16-bit 1x1/1 geglu", (32768, 2560, 320)): "cuda",
}


@pytest.mark.parametrize("shape", MEASURED, ids=lambda key: f"{key[0]} {key[1]}")
def test_choices_for_an_h200(shape: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tables.read(tables.FOLDER / "nvidia-h200.json")
    operator, key, sizes = shape
    (times,) = [t for t in table.choices[operator, key] if t.sizes == sizes]
    assert next(iter(times.microseconds)) == MEASURED[shape]
