"""Writes docs/performance.md and docs/speed.png from the stored results, so that no number on the page is typed.

    python benchmarks/report.py

Every file of benchmarks/results/<kind of machine>/ that SECTIONS has becomes a section with its device, versions and
command. README.md has one table of its own between two marks, which is written, too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from vpd_fast.bench import plots
from vpd_fast.bench.statistics import number
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
OURS = ("cpu", "cuda", "triton", "operator")  # beginnings of variants that are our implementations
Row = dict[str, Any]


def table(columns: Mapping[str, str], rows: Iterable[Row]) -> str:
    """A table of Markdown. columns: {heading: format}, of the values of a row and of what `texts` makes of them."""
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[text.format_map(texts(row)) for text in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def texts(row: Row) -> Row:
    """The row with its usual numbers as the tables show them: ms, seconds, range, times, peak, equal."""
    shown = row | {"times": speedup(row), "equal": f"{row['equal_labels']:.1%}" if "equal_labels" in row else ""}
    if "p50_ms" in row:
        shown |= {"ms": number(row["p50_ms"]), "seconds": number(row["p50_ms"] / 1e3)}
    if "p20_ms" in row:
        shown["range"] = f"{number(row['p20_ms'] / 1e3)} - {number(row['p80_ms'] / 1e3)}"
    if "peak_mib" in row or "peak_gib" in row:
        shown["peak"] = f"{row['peak_gib'] if 'peak_gib' in row else row['peak_mib']['run'] / 1024:.1f} GiB"
    return shown


def speedup(row: Row) -> str:
    """Speed-up of the whole pass, or of encoder and UNet."""
    if row.get("parity") == "failed":
        return "gate failed"
    if "speedup" in row:
        return f"{row['speedup']:.2f}x"
    return f"{row['backbone_speedup']:.2f}x (encoder, UNet)" if "backbone_speedup" in row else ""


def device(environment: Row) -> str:
    """One line about what was measured on."""
    parts = [environment["device"]]
    parts += [f"{environment['threads']} threads, {environment['isa']}"] if environment.get("isa") else []
    parts += [f"{n} {environment[n]}" for n in ("torch", "triton", "openvino", "diffusers") if n in environment]
    return ", ".join([*parts, environment["time"][:10]])


# What stands below the heading of a section, by what its file holds: (path, content) -> paragraphs and tables


def bench(_: Path, content: Row) -> list[str]:
    """A file of `vpd-fast bench --json`."""
    rows = []
    for row in content["rows"]:
        stages, cosines = row["stages_ms"], row.get("cosines")
        rows.append(row | {stage: number(stages[stage] / 1e3) for stage in ("encoder", "unet")})
        rows[-1]["worst"] = f"{min(cosines['features']):.4f}" if cosines else ""
    columns = {
        "image": "{case}", "variant": "{variant}", "seconds (p20 - p80)": "{seconds} ({range})",
        "speed-up": "{times}", "encoder": "{encoder}", "UNet": "{unet}", "peak memory": "{peak}",
        "worst cosine of features": "{worst}", "equal labels": "{equal}", "rounds": "{rounds}",
    }  # fmt: skip
    stopped = [] if content["finished"] else ["Stopped before all variants had their turns.\n"]
    return [*stopped, table(columns, rows)]


def larger_images(path: Path, content: Row) -> list[str]:
    """Whole passes by size."""
    rows = {(r["case"], r["variant"]): r["p50_ms"] for r in content["rows"]}
    growth = [rows["1x3x1024x1024", name] / rows["1x3x512x512", name] for name in ("fast bf16", "fast int8")]
    note = f"""\
At 1024x1024 the plain model's probabilities do not fit into 24 GiB, so the ratio is to the plain model with
SDPA. Self-attention grows with the fourth power of an image's side, so a pass there takes {growth[0]:.1f} times
one at 512x512 in bf16 and {growth[1]:.1f} times in int8. Counted by operations it is 5.0 times (154 of 1943
GFLOP grow 16-fold, the rest 4-fold); Winograd's algorithm and 8 bits make all but attention faster.
"""
    return [*bench(path, content), note]


def plain_forms(_: Path, content: Row) -> list[str]:
    """Plain models without `optimize`, in one process."""
    columns = {"variant": "{variant}", "seconds": "{seconds}", "speed-up": "{times}", "peak memory": "{peak}",
               "cosine of the logits": "{cosine:.4f}"}  # fmt: skip
    return [table(columns, content["rows"])]


def train_step(_: Path, content: Row) -> list[str]:
    """Training steps."""
    estimate = content["activations_gib_estimated"]["1"]["plain, nothing recomputed"]
    note = f"""\
One step: encoder, forward, backward, AdamW; batch 1 at 512x512. "plain" is as the original: attention written
out, every transformer block recomputed; without recomputing it would keep an estimated {estimate:.1f} GiB. Of
what bf16 keeps, 1.6 GiB are its copies of the weights. Nothing is timed unless loss and gradients agree with
"plain" first.
"""
    columns = {"variant": "{variant}", "seconds": "{seconds}", "speed-up": "{speedup:.1f}x", "peak memory": "{peak}",
               "kept for backward": "{activations_gib:.2f} GiB",
               "worst cosine of gradients": "{gradients:.4f}"}  # fmt: skip
    names = [k for k in content["rows"][0] if k.startswith("cosine_") and k != "cosine_latents"]
    return [note, table(columns, [r | {"gradients": min(r[name] for name in names)} for r in content["rows"]])]


def layers(_: Path, content: Row) -> list[str]:
    """Where the time goes: the largest parts of the int8 pass."""
    peak = ", ".join(f"{number(rate)} in {name}" for name, rate in content["peak_gflop_per_s"].items())
    note = f"""\
The largest parts of the fast int8 model's pass at 512x512. "Of peak" compares the products that are made, fewer
than by definition with Winograd's algorithm, with a large product of oneDNN in the same precision; GFLOP/s of
those: {peak}.
"""
    rows = [r | {"ms": number(r["ms"]), "of_peak": f"{r['of_peak']:.0%}" if "of_peak" in r else ""}
            for r in content["rows"] if (r["precision"], r["size"]) == ("int8", 512)][:16]  # fmt: skip
    columns = {"stage": "{stage}", "part": "{part}", "products in": "{in}", "calls": "{calls}", "ms": "{ms}",
               "share": "{share:.1%}", "of peak": "{of_peak}"}  # fmt: skip
    return [note, table(columns, rows)]


def roofline(path: Path, content: Row) -> list[str]:
    """Floors beside measured times, by kind of layer."""
    gaps = ("gap", *(f"gap of {kind}" for kind in ("convolution", "linear", "self-attention")))
    rows: dict[str, Row] = {}
    for precision in dict.fromkeys(row["precision"] for row in content["rows"]):
        rows[precision] = {"precision": precision}
        for name in gaps:
            kind = name.removeprefix("gap of ")
            parts = [r for r in content["rows"] if r["precision"] == precision and kind in ("gap", r["kind"])]
            floor, ms = (sum(row[key] for row in parts) / 1e3 for key in ("floor_ms", "ms"))
            rows[precision][name] = ms / floor
            if name == "gap":
                rows[precision] |= {"floor": floor, "measured": ms}
    note = """\
The engine's code runs on tensors without memory, and every operator is counted while it is called. An operation
takes at least its products over the device's rate, its operands (each moved once) over the bandwidth, or for
attention its exponentials over their rate, whichever is longest: its floor. "Gap" is measured over floor.
"""
    picture = path.with_suffix(".png")
    shown = f"![rates of the layers below the roofs of the machine](../{picture.relative_to(ROOT).as_posix()})\n"
    columns = {"": "{precision}", "floor": "{floor:.2f} s", "measured": "{measured:.2f} s"}
    columns |= {name: f"{{{name}:.2f}}" for name in gaps}
    return [note, table(columns, rows.values()), *([shown] if picture.is_file() else [])]


def operator(_: Path, content: Row) -> list[str]:
    """One operator beside the library: the fastest of our variants in every case; of labels, each instruction set."""
    cases: dict[tuple, list[Row]] = {}
    for row in content["rows"]:
        words = (row.get("case") or row["shape"], row.get("precision") or row["dtype"], row.get("logits", ""))
        cases.setdefault(words, []).append(row)
    lines = []
    for (case, precision, logits), rows in cases.items():
        base = next(row for row in rows if row["variant"] == row["over"])
        ours = [row for row in rows if row["variant"].startswith(OURS)]
        full = [row for row in ours if " full " in row["variant"]]
        named = {"case": case, "precision": precision, "base": f"{base['variant']} {number(base['p50_ms'])}"}
        lines += [row | named for row in (ours if logits else [fastest(full or ours)])]
    columns = {"case": "{case}", "precision": "{precision}"}
    columns |= {"logits": "{logits}"} if "logits" in content["rows"][0] else {}
    columns |= {"PyTorch, ms": "{base}", "ours, ms": "{variant} {ms}", "speed-up": "{times}"}
    return [table(columns, lines)]


def fastest(rows: Iterable[Row]) -> Row:
    """The fastest of our implementations."""
    return min(rows, key=lambda row: row["p50_ms"])


def attention_with_maps(_: Path, content: Row) -> list[str]:
    """cross_attention_maps at 150 tokens."""
    cases: dict[tuple, dict[str, Row]] = {}
    for row in content["rows"]:
        if row["tokens"] == 150 and "dtype" in row:
            cases.setdefault((row["shape"], row["dtype"]), {})[row["variant"]] = row
    peers = {"eager": "eager", "SDPA, no maps": "sdpa without maps", "SDPA + second pass": "sdpa and maps"}
    lines = []
    for found in cases.values():
        ours = [row for name, row in found.items() if name.startswith(OURS)]
        if ours:
            times = {name: number(found[name]["p50_ms"]) if name in found else "" for name in peers.values()}
            best = fastest(ours)
            lines.append(best | times | {"sdpa": f"{best['over_sdpa']:.1f}x" if "over_sdpa" in best else ""})
    note = """\
150 tokens, 8 heads, milliseconds; images x queries x heads x head dimension. SDPA gives no maps, with a second
pass it does. Eager PyTorch's time depends on whether its temporary memory stays mapped between calls: of the
first row it doubles if not. At 8x8 positions, and at 16x16 with few tokens, where a call takes less than 1 ms,
SDPA is faster.
"""
    columns = {"shape": "{shape}", "dtype": "{dtype}", **{title: f"{{{name}}}" for title, name in peers.items()}}
    columns |= {"ours": "{ms}", "over eager": "{speedup:.1f}x", "over SDPA": "{sdpa}"}
    return [note, table(columns, lines)]


def first_gpu_pass(_: Path, content: Row) -> list[str]:
    """The first measurement on a GPU."""
    time = {(r["case"][0], r["variant"], r.get("products")): number(r["ms_per_image"]) for r in content["rows"]}
    rivals = (("fast int8", "triton"), ("fast bf16", "triton"), ("sdpa, bfloat16 channels-last, torch.compile", None))
    int8, bf16, compiled = (time["8", name, products] for name, products in rivals)
    note = f"""\
Collected by hand from first measurements, before that command measured all of it, with several processes on the GPU
at once: times are an indication. As it was by default then
(products by Triton) a fast model is **slower than `torch.compile`** at batch 8: {int8} ms an image in int8
and {bf16} in bf16, against {compiled}. With products in CUDA C++ or by cuBLAS and cuDNN, which the table of this
GPU chooses between since then, it is as fast or faster. "Replays" are of one CUDA graph of the whole pass,
"calls" include launching; the compiled model was recompiled several times and is not the best that
`torch.compile` can do. The int8 times include a preparation of images that a normal call does once and this
measurement did twice.
"""
    passes = {"images": "{case}", "variant": "{variant}", "products by": "{products}", "timed": "{timed}",
              "ms": "{ms}", "ms per image": "{image}"}  # fmt: skip
    rows = [{"products": ""} | r | {"image": number(r["ms_per_image"])} for r in content["rows"]]
    agreement = {"": "{variant}", "latents": "{latents:.5f}", "worst feature": "{features:.5f}",
                 "logits": "{logits:.5f}", "equal labels": "{equal}"}  # fmt: skip
    times = {"eager": "eager", "SDPA, no maps": "sdpa", "SDPA + second pass": "sdpa+maps", "Triton": "triton",
             "CUDA C++": "cuda"}  # fmt: skip
    attention = {"shape": "{shape}", "tokens": "{tokens}", **{title: f"{{{name}}}" for title, name in times.items()}}
    maps = [r | {n: number(r["microseconds"][n]) for n in times.values()} for r in content["cross_attention_maps"]]
    return [
        note,
        table(passes, rows),
        "Cosines to the plain float32 model on that GPU. All but fp8, whose worst is 0.00004 below, pass their gate.\n",
        table(agreement, content["agreement"]),
        "`cross_attention_maps` in bfloat16, microseconds, cold cache; SDPA alone gives no maps:\n",
        table(attention, maps),
    ]


def implementations(_: Path, content: Row) -> list[str]:
    """Layers and operators by implementation."""
    names = ("triton", "cuda", "library")
    found: dict[tuple[str, ...], Row] = {}
    for r in content["rows"]:
        key = r["stage"], r["part"], r["in"]
        row = found.setdefault(key, {**{name: r[name] for name in ("stage", "part", "in", "calls")}, "all": {}})
        row["all"].setdefault(r["products"], r["ms"])
    rows = [r for r in found.values() if len(r["all"]) > 1 and max(r["all"].values()) >= 0.1]
    for r in rows:
        r |= {name: number(r["all"][name]) if name in r["all"] else "" for name in names}
    note = """\
Collected by hand from the same first measurements, several processes side by side; products of all layers by one
implementation, milliseconds of a pass of 8 images, cold cache. Where CUDA C++ or a library cannot compute a
layer, Triton did. Preparing the image is in them, in 8-bit convolutions twice (a call does it once), equally
for every implementation. `vpd-fast tune --from` makes `kernels/configs/nvidia-h200.json` of this file.
"""
    columns = {"stage": "{stage}", "part": "{part}", "in": "{in}", "calls": "{calls}", "Triton": "{triton}",
               "CUDA C++": "{cuda}", "cuBLAS, cuDNN": "{library}"}  # fmt: skip
    others = [r | {"what": _what(r), "all": ", ".join(f"{n} {number(us)}" for n, us in r["us"].items())}
              for r in content["operators"]]  # fmt: skip
    single = {"operator": "{operator}", "of": "{what}", "microseconds": "{all}"}
    return [note, table(columns, rows), "Operators alone, cold cache:\n", table(single, others)]


def _what(row: Row) -> str:
    if "logits" in row:
        return f"{'x'.join(map(str, row['logits']))} to {'x'.join(map(str, row['size']))}"
    tokens = f", {row['tokens']} tokens" if "tokens" in row else ""
    return f"{'x'.join(str(row[name]) for name in ('batch', 'queries', 'heads', 'dim'))}{tokens}"


BENCH = "vpd-fast bench --random-weights 0"
SIZES = "--precision bf16,int8 --peers none --size 512,768,1024 --rounds 3"
TRAIN = 'python benchmarks/train_step.py --steps 3 --variants fp32 bf16 "bf16 recomputed"'
PYTEST = "VPD_FAST_RESULTS=benchmarks/results pytest benchmarks/test_{}.py -m 'exhaustive or not exhaustive'"
OPERATORS = ("upsample_argmax", "self_attention", "linear", "conv2d", "winograd_conv2d", "group_norm_affine")
# By the name of the file: heading, command, and what makes the rest. {folder} is that of the file.
SECTIONS: dict[str, tuple[str, str, Callable[[Path, Row], list[str]]]] = {
    "bench": ("Whole passes", f"{BENCH} --peers openvino --rounds 4", bench),
    "bench_sizes": ("Larger images", f"{BENCH} {SIZES}", larger_images),
    "bench_diffusers": ("Beside diffusers", f"{BENCH} --peers all --rounds 6 --seconds 420", bench),
    "e2e": (
        "Plain models, without optimize",
        "vpd-fast bench --in-process --random-weights 0 --precision none --rounds 3",
        plain_forms,
    ),
    "implementations": (
        "Which implementation is fastest",
        "benchmarks/layers.py and benchmarks/test_*.py --device cuda",
        implementations,
    ),
    "first_pass": ("First passes on a GPU", "vpd-fast bench --in-process --device cuda --batch 1,8", first_gpu_pass),
    "train_step": ("Training steps", TRAIN, train_step),
    "layers": ("How far from the peak", "python benchmarks/layers.py", layers),
    "roofline": (
        "How far from what is possible",
        "python benchmarks/roofline.py --device {folder}/layers.json",
        roofline,
    ),
    "cross_attention_maps": ("`cross_attention_maps`", PYTEST.format("cross_attention_maps"), attention_with_maps),
    **{name: (f"`{name}`", PYTEST.format(name), operator) for name in OPERATORS},
}


def section(path: Path) -> str:
    """The section of a file: a heading, where the numbers come from, and the rest."""
    title, command, body = SECTIONS[path.stem]
    content, source = json.loads(path.read_text(encoding="utf-8")), path.relative_to(ROOT)
    origin = f"`{command.format(folder=source.parent.as_posix())}`, `{source.as_posix()}`"
    return "\n".join([f"### {title}\n", f"{origin} ({device(content['environment'])}).\n", *body(path, content)])


def page() -> str:
    """docs/performance.md."""
    parts = [HEAD]
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        found = [path for name in SECTIONS if (path := folder / f"{name}.json").is_file()]
        parts += [f"## {folder.name}\n", *map(section, found)] if found else []
    return "\n".join(parts)


def readme(text: str) -> str:
    """README.md with its table of speed written anew."""
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    rows = json.loads((MAIN / "bench.json").read_text(encoding="utf-8"))["rows"]
    columns = {"": "{variant}", "seconds": "{seconds}", "speed-up": "{times}", "peak memory": "{peak}",
               "equal labels": "{equal}"}  # fmt: skip
    return f"{head}{BEGIN}\n\n{table(columns, rows)}\n{END}{tail}"


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
