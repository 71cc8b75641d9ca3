"""Writes docs/performance.md and docs/speed.png from the stored results, so that no number on the page is typed.

    python benchmarks/report.py

Every file of benchmarks/results/<kind of machine>/ that this script knows becomes a section with its device, versions
and command. README.md has one table of its own between two marks, which is written, too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from vpd_fast.bench import plots
from vpd_fast.files import write_files

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MAIN = RESULTS / "amd-epyc-avx512-bf16"  # of the README
BEGIN, END = "<!-- written by benchmarks/report.py -->", "<!-- end -->"
HEAD = f"""\
# Performance
{BEGIN}

`python benchmarks/report.py` writes this page from `benchmarks/results/`; do not edit it. Weights are random,
models have the full size of Stable Diffusion 1.5 unless a table says otherwise. Variants of a table took turns
in one run on one machine, and a speed-up is the median of the ratios within a round. No speed-up is shown
unless the outputs agree with the plain model's: the least cosine of every feature map and of the logits is
0.9999 in fp32, 0.999 in bf16 and fp16, 0.995 in int8, 0.98 in fp8. Numbers that disappoint are here, too.
"""
PYTEST = "VPD_FAST_RESULTS=benchmarks/results pytest benchmarks/test_{}.py -m 'exhaustive or not exhaustive'"
OPERATORS = ("upsample_argmax", "self_attention", "linear", "conv2d", "winograd_conv2d", "group_norm_affine")
Row = dict[str, Any]


def number(value: float) -> str:
    """Three digits or so."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table of Markdown."""
    lines = [list(columns)]
    lines += [["---"] * len(lines[0]), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def device(environment: Row) -> str:
    """One line about what was measured on."""
    parts = [environment["device"]]
    parts += [f"{environment['threads']} threads, {environment['isa']}"] if environment.get("isa") else []
    parts += [
        f"{name} {environment[name]}" for name in ("torch", "triton", "openvino", "diffusers") if name in environment
    ]
    return ", ".join([*parts, environment["time"][:10]])


def section(title: str, command: str, path: Path, content: Row, *parts: str) -> str:
    """A heading, where the numbers come from, and the rest."""
    source = path.relative_to(ROOT).as_posix()
    return "\n".join([f"### {title}\n", f"`{command}`, `{source}` ({device(content['environment'])}).\n", *parts])


def speedup(row: Row) -> str:
    """Speed-up of the whole pass, or of encoder and UNet."""
    if row.get("parity") == "failed":
        return "gate failed"
    if "speedup" in row:
        return f"{row['speedup']:.2f}x"
    return f"{row['backbone_speedup']:.2f}x (encoder, UNet)" if "backbone_speedup" in row else ""


def bench_table(rows: Iterable[Row]) -> str:
    """Rows of `vpd-fast bench`."""
    columns = ("image", "variant", "seconds (p20 - p80)", "speed-up", "encoder", "UNet", "peak memory",
               "worst cosine of features", "equal labels", "rounds")  # fmt: skip
    lines = []
    for row in rows:
        stages, cosines = row["stages_ms"], row.get("cosines")
        lines.append((
            row["case"], row["variant"],
            f"{number(row['p50_ms'] / 1e3)} ({number(row['p20_ms'] / 1e3)} - {number(row['p80_ms'] / 1e3)})",
            speedup(row), number(stages["encoder"] / 1e3), number(stages["unet"] / 1e3),
            f"{row['peak_mib']['run'] / 1024:.1f} GiB", f"{min(cosines['features']):.4f}" if cosines else "",
            f"{row['equal_labels']:.1%}" if "equal_labels" in row else "", row["rounds"],
        ))  # fmt: skip
    return table(columns, lines)


def bench(path: Path, content: Row, title: str = "Whole passes", command: str = "--peers openvino --rounds 4") -> str:
    """A file of `vpd-fast bench --json`."""
    stopped = [] if content["finished"] else ["Stopped before all variants had their turns.\n"]
    return section(
        title, f"vpd-fast bench --random-weights 0 {command}", path, content, *stopped, bench_table(content["rows"])
    )


def plain_forms(path: Path, content: Row) -> str:
    """Plain models without `optimize`, in one process."""
    rows = [(r["variant"], number(r["p50_ms"] / 1e3), f"{r['speedup']:.2f}x", f"{r['peak_gib']:.1f} GiB",
             f"{r['cosine']:.4f}") for r in content["rows"]]  # fmt: skip
    columns = ("variant", "seconds", "speed-up", "peak memory", "cosine of the logits")
    command = "vpd-fast bench --in-process --random-weights 0 --precision none --rounds 3"
    return section("Plain models, without optimize", command, path, content, table(columns, rows))


def train_step(path: Path, content: Row) -> str:
    """Training steps."""
    columns = ("variant", "seconds", "speed-up", "peak memory", "kept for backward", "worst cosine of gradients")
    rows = []
    for r in content["rows"]:
        gradients = min(v for k, v in r.items() if k.startswith("cosine_") and k != "cosine_latents")
        rows.append((r["variant"], number(r["p50_ms"] / 1e3), f"{r['speedup']:.1f}x", f"{r['peak_gib']:.1f} GiB",
                     f"{r['activations_gib']:.2f} GiB", f"{gradients:.4f}"))  # fmt: skip
    estimate = content["activations_gib_estimated"]["1"]["plain, nothing recomputed"]
    note = f"""\
One step: encoder, forward, backward, AdamW; batch 1 at 512x512. "plain" is as the original: attention written
out, every transformer block recomputed; without recomputing it would keep an estimated {estimate:.1f} GiB. Of
what bf16 keeps, 1.6 GiB are its copies of the weights. Nothing is timed unless loss and gradients agree with
"plain" first.
"""
    command = 'python benchmarks/train_step.py --steps 3 --variants fp32 bf16 "bf16 recomputed"'
    return section("Training steps", command, path, content, note, table(columns, rows))


def layers(path: Path, content: Row) -> str:
    """Where the time goes: the largest parts of the int8 pass."""
    peak = ", ".join(f"{number(rate)} in {name}" for name, rate in content["peak_gflop_per_s"].items())
    note = f"""\
The largest parts of the fast int8 model's pass at 512x512. "Of peak" compares the products that are made, fewer
than by definition with Winograd's algorithm, with a large product of oneDNN in the same precision; GFLOP/s of
those: {peak}.
"""
    rows = [(r["stage"], r["part"], r["in"], r["calls"], number(r["ms"]), f"{r['share']:.1%}",
             f"{r['of_peak']:.0%}" if "of_peak" in r else "")
            for r in content["rows"] if (r["precision"], r["size"]) == ("int8", 512)][:16]  # fmt: skip
    columns = ("stage", "part", "products in", "calls", "ms", "share", "of peak")
    return section("How far from the peak", "python benchmarks/layers.py", path, content, note, table(columns, rows))


def roofline(path: Path, content: Row) -> str:
    """Floors beside measured times, by kind of layer."""
    kinds = ("convolution", "linear", "self-attention")
    rows = []
    for precision in dict.fromkeys(row["precision"] for row in content["rows"]):
        parts = [row for row in content["rows"] if row["precision"] == precision]

        def gap(of: Callable[[Row], bool], parts: list[Row] = parts) -> float:
            return sum(r["ms"] for r in parts if of(r)) / sum(r["floor_ms"] for r in parts if of(r))

        floor, ms = (sum(row[name] for row in parts) / 1e3 for name in ("floor_ms", "ms"))
        gaps = [gap(lambda row, kind=kind: row["kind"] == kind) for kind in kinds]
        rows.append((precision, f"{floor:.2f} s", f"{ms:.2f} s", *(f"{value:.2f}" for value in (ms / floor, *gaps))))
    note = """\
The engine's code runs on tensors without memory, and every operator is counted while it is called. An operation
takes at least its products over the device's rate, its operands (each moved once) over the bandwidth, or for
attention its exponentials over their rate, whichever is longest: its floor. "Gap" is measured over floor.
"""
    picture = path.with_suffix(".png")
    shown = f"![rates of the layers below the roofs of the machine](../{picture.relative_to(ROOT).as_posix()})\n"
    columns = ("", "floor", "measured", "gap", *(f"gap of {kind}" for kind in kinds))
    command = f"python benchmarks/roofline.py --device {path.with_name('layers.json').relative_to(ROOT).as_posix()}"
    parts = [note, table(columns, rows), *([shown] if picture.is_file() else [])]
    return section("How far from what is possible", command, path, content, *parts)


def best(rows: Iterable[Row]) -> Row:
    """The fastest of our implementations."""
    return min(rows, key=lambda row: row["p50_ms"])


def operator(path: Path, content: Row) -> str:
    """One operator beside the library: the fastest of our variants in every case; of labels, each instruction set."""
    cases: dict[tuple, list[Row]] = {}
    for row in content["rows"]:
        words = (row.get("case") or row["shape"], row.get("precision") or row["dtype"], row.get("logits", ""))
        cases.setdefault(words, []).append(row)
    lines = []
    for words, rows in cases.items():
        base = next(row for row in rows if row["variant"] == row["over"])
        ours = [row for row in rows if row["variant"].startswith(("cpu", "cuda", "triton"))]
        full = [row for row in ours if " full " in row["variant"]]
        for own in ours if words[2] else [best(full or ours)]:
            lines.append((*words[:2], *([words[2]] if words[2] else []), f"{base['variant']} {number(base['p50_ms'])}",
                          f"{own['variant']} {number(own['p50_ms'])}", f"{own['speedup']:.2f}x"))  # fmt: skip
    logits = ["logits"] if "logits" in content["rows"][0] else []
    columns = ("case", "precision", *logits, "PyTorch, ms", "ours, ms", "speed-up")
    command = PYTEST.format(path.stem)
    return section(f"`{path.stem}`", command, path, content, table(columns, lines))


def attention_with_maps(path: Path, content: Row) -> str:
    """cross_attention_maps at 150 tokens."""
    cases: dict[tuple, dict[str, Row]] = {}
    for row in content["rows"]:
        if row["tokens"] == 150 and "dtype" in row:
            cases.setdefault((row["shape"], row["dtype"]), {})[row["variant"]] = row
    lines = []
    for words, found in cases.items():
        ours = [row for name, row in found.items() if name.startswith(("cpu", "cuda", "triton", "operator"))]
        if not ours:
            continue
        own = best(ours)
        times = [
            number(found[name]["p50_ms"]) if name in found else ""
            for name in ("eager", "sdpa without maps", "sdpa and maps")
        ]
        lines.append(
            (
                *words,
                *times,
                number(own["p50_ms"]),
                f"{own['speedup']:.1f}x",
                f"{own['over_sdpa']:.1f}x" if "over_sdpa" in own else "",
            )
        )
    note = """\
150 tokens, 8 heads, milliseconds; images x queries x heads x head dimension. SDPA gives no maps, with a second
pass it does. Eager PyTorch's time depends on whether its temporary memory stays mapped between calls: of the
first row it doubles if not. At 8x8 positions, and at 16x16 with few tokens, where a call takes less than 1 ms,
SDPA is faster.
"""
    columns = ("shape", "dtype", "eager", "SDPA, no maps", "SDPA + second pass", "ours", "over eager", "over SDPA")
    command = PYTEST.format(path.stem)
    return section("`cross_attention_maps`", command, path, content, note, table(columns, lines))


def first_gpu_pass(path: Path, content: Row) -> str:
    """The first measurement on a GPU."""
    rows = [(r["case"], r["variant"], r.get("products", ""), r["timed"], number(r["p50_ms"]), number(r["ms_per_image"]))
            for r in content["rows"]]  # fmt: skip
    time = {(r["case"][0], r["variant"], r.get("products")): r["ms_per_image"] for r in content["rows"]}
    eight = [number(time["8", f"fast {precision}", "triton"]) for precision in ("int8", "bf16")]
    compiled = number(time["8", "sdpa, bfloat16 channels-last, torch.compile", None])
    note = f"""\
Collected by hand from first measurements, before that command measured all of it, with several processes on the GPU
at once: times are an indication. As it is by default
(products by Triton) a fast model is **slower than `torch.compile`** at batch 8: {eight[0]} ms an image in int8
and {eight[1]} in bf16, against {compiled}. With products in CUDA C++ or by cuBLAS and cuDNN, which `vpd-fast
tune` may choose, it is as fast or faster. "Replays" are of one CUDA graph of the whole pass, "calls" include
launching; the compiled model was recompiled several times and is not the best that `torch.compile` can do. The
int8 times include a preparation of images that a normal call does once and this measurement did twice.
"""
    agreement = [(r["variant"], *(f"{r[name]:.5f}" for name in ("latents", "features", "logits")),
                  f"{r['equal_labels']:.1%}") for r in content["agreement"]]  # fmt: skip
    names = ("eager", "sdpa", "sdpa+maps", "triton", "cuda")
    attention = [(r["shape"], r["tokens"], *(number(r["microseconds"][name]) for name in names))
                 for r in content["cross_attention_maps"]]  # fmt: skip
    parts = [
        note,
        table(("images", "variant", "products by", "timed", "ms", "ms per image"), rows),
        "Cosines to the plain float32 model on that GPU. All but fp8, whose worst is 0.00004 below, pass their gate.\n",
        table(("", "latents", "worst feature", "logits", "equal labels"), agreement),
        "`cross_attention_maps` in bfloat16, microseconds, cold cache; SDPA alone gives no maps:\n",
        table(("shape", "tokens", "eager", "SDPA, no maps", "SDPA + second pass", "Triton", "CUDA C++"), attention),
    ]
    return section(
        "First passes on a GPU", "vpd-fast bench --in-process --device cuda --batch 1,8", path, content, *parts
    )


def larger_images(path: Path, content: Row) -> str:
    """Whole passes by size."""
    options = "--precision bf16,int8 --peers none --size 512,768,1024 --rounds 3"
    rows = {(r["case"], r["variant"]): r["p50_ms"] for r in content["rows"]}
    growth = [rows["1x3x1024x1024", name] / rows["1x3x512x512", name] for name in ("fast bf16", "fast int8")]
    note = f"""\
At 1024x1024 the plain model's probabilities do not fit into 24 GiB, so the ratio is to the plain model with
SDPA. Self-attention grows with the fourth power of an image's side, so a pass there takes {growth[0]:.1f} times
one at 512x512 in bf16 and {growth[1]:.1f} times in int8. Counted by operations it is 5.0 times (154 of 1943
GFLOP grow 16-fold, the rest 4-fold); Winograd's algorithm and 8 bits make all but attention faster.
"""
    return "\n".join([bench(path, content, "Larger images", options), note])


SECTIONS: dict[str, Callable[[Path, Row], str]] = {
    "bench": bench,
    "bench_sizes": larger_images,
    "bench_diffusers": partial(bench, title="Beside diffusers", command="--peers all --rounds 6 --seconds 420"),
    "e2e": plain_forms,
    "first_pass": first_gpu_pass,
    "train_step": train_step,
    "layers": layers,
    "roofline": roofline,
    "cross_attention_maps": attention_with_maps,
    **dict.fromkeys(OPERATORS, operator),
}


def page() -> str:
    """docs/performance.md."""
    parts = [HEAD]
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        found = [(name, folder / f"{name}.json") for name in SECTIONS if (folder / f"{name}.json").is_file()]
        if found:
            parts.append(f"## {folder.name}\n")
            parts += [SECTIONS[name](path, json.loads(path.read_text(encoding="utf-8"))) for name, path in found]
    return "\n".join(parts)


def readme(text: str) -> str:
    """README.md with its table of speed written anew."""
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    rows = json.loads((MAIN / "bench.json").read_text(encoding="utf-8"))["rows"]
    columns = ("", "seconds", "speed-up", "peak memory", "equal labels")
    lines = [(r["variant"], number(r["p50_ms"] / 1e3), speedup(r), f"{r['peak_mib']['run'] / 1024:.1f} GiB",
              f"{r['equal_labels']:.1%}" if "equal_labels" in r else "") for r in rows]  # fmt: skip
    return f"{head}{BEGIN}\n\n{table(columns, lines)}\n{END}{tail}"


def main() -> None:
    """Write the page, the chart and the README's table."""
    content = json.loads((MAIN / "bench.json").read_text(encoding="utf-8"))
    figure = plots.stage_bars(content["rows"], device(content["environment"]))
    text, front = page(), readme((ROOT / "README.md").read_text(encoding="utf-8"))
    write_files({
        ROOT / "docs" / "performance.md": lambda path: path.write_text(text, encoding="utf-8"),
        ROOT / "docs" / "speed.png": lambda path: plots.save(figure, path),
        ROOT / "README.md": lambda path: path.write_text(front, encoding="utf-8"),
    })  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
