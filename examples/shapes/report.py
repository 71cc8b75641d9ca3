"""Tables and plots of docs/shapes.md from the rows of analysis.py."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from experiments import PRECISIONS, PRETRAINED, RANDOM, VARIANTS

from vpd_fast.checkpoints import open_checkpoint
from vpd_fast.config import TASKS
from vpd_fast.data.shapes.language import KINDS
from vpd_fast.errors import InputError, MissingDependencyError
from vpd_fast.files import write_files

Rows = list[dict[str, Any]]
SHOWN = {
    "segmentation": ("mIoU", "aAcc"),
    "referring": ("oIoU", "mIoU", "P@0.5", *(f"P@0.5, {kind}" for kind in KINDS)),
    "depth": ("abs_rel", "rmse", "d1"),
}


def spread(values: list[float], digits: int = 3, sign: str = "") -> str:
    """Mean and, of several, the sample's standard deviation. sign: "+" shows that of positive means as well."""
    mean = statistics.mean(values)
    return f"{mean:{sign}.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def finals(rows: Rows, task: str, variant: str) -> dict[int, float]:
    """Seed: the metric at the end of its run."""
    last: dict[int, tuple[int, float]] = {}
    for row in rows:
        if (row["kind"], row["task"], row["variant"]) == ("curve", task, variant):
            last[row["seed"]] = max(last.get(row["seed"], (0, 0.0)), (row["step"], row["value"]))
    return {seed: value for seed, (_, value) in last.items()}


def models_table() -> str:
    """Markdown: the bundled models on held-out scenes, from their own records."""
    lines = [
        "| task | metric | float32 | 8-bit weights | scenes with an unseen pair |",
        "| --- | --- | --- | --- | --- |",
    ]
    for task, names in SHOWN.items():
        record = open_checkpoint(f"shapes-{task}").metadata["record"]
        for name in names:
            values = (record["float32"]["test"], record["8-bit weights"]["test"], record["8-bit weights"]["unseen"])
            lines.append(f"| {task} | {name} | {' | '.join(f'{found[name]:.4f}' for found in values)} |")
    return "\n".join(lines)


def variants_table(rows: Rows, task: str) -> str:
    """Markdown: every variant of a task at the end, and its difference to the first with the same seed."""
    metric = next((row["metric"] for row in rows if row["task"] == task), "metric")
    lines = [f"| {task} | {metric} | difference | runs |", "| --- | --- | --- | --- |"]
    base = finals(rows, task, PRETRAINED)
    for variant in (v for v in VARIANTS if v.task == task):
        values = finals(rows, task, variant.name)
        if not values:
            continue
        paired = [value - base[seed] for seed, value in values.items() if seed in base and variant.name != PRETRAINED]
        difference = spread(paired, sign="+") if paired else ""
        lines.append(f"| {variant.name} | {spread(list(values.values()))} | {difference} | {len(values)} |")
    return "\n".join(lines)


def curves_of(rows: Rows, task: str) -> dict[str, list[tuple[int, float, float]]]:
    """{what the plot calls it: mean curve} of a task's variants that have one."""
    return {v.curve: mean_curve(rows, task, v.name) for v in VARIANTS if v.task == task and v.curve}


def steps_table(rows: Rows) -> str:
    """Markdown: after how many steps the pre-trained model is where the random one ends."""
    lines = ["| task | random UNet at the end | steps | pre-trained is there after |", "| --- | --- | --- | --- |"]
    for task in TASKS:
        curves = curves_of(rows, task)
        if not all(curves.values()):
            continue
        end, value = curves[RANDOM][-1][:2]
        sign = -1 if task == "depth" else 1
        reached = next((step for step, mean, _ in curves[PRETRAINED] if sign * mean >= sign * value), None)
        lines.append(f"| {task} | {value:.3f} | {end} | {'not reached' if reached is None else f'{reached} steps'} |")
    return "\n".join(lines)


def precision_table(rows: Rows) -> str:
    """Markdown: tasks by precisions, mean and spread over the seeds."""
    lines = [f"| | {' | '.join(PRECISIONS)} |", f"| --- |{' --- |' * len(PRECISIONS)}"]
    for task in TASKS:
        found = [r for r in rows if r["kind"] == "precision" and r["task"] == task and r["variant"] == PRETRAINED]
        if len(found) < len(PRECISIONS):
            continue
        values = {p: {r["seed"]: r["value"] for r in found if r["precision"] == p} for p in PRECISIONS}
        cells = [spread(list(values[p].values()), 4) for p in PRECISIONS]
        changes = [spread([v - values["fp32"][seed] for seed, v in values[p].items()], 4, "+") for p in PRECISIONS]
        lines.append(f"| {task}, {found[0]['metric']} | {' | '.join(cells)} |")
        lines.append(f"| change to fp32 | {' | '.join(changes)} |")
    return "\n".join(lines)


def mean_curve(rows: Rows, task: str, variant: str) -> list[tuple[int, float, float]]:
    """(step, mean, standard deviation) over the seeds."""
    by_step: dict[int, list[float]] = {}
    for row in rows:
        if (row["kind"], row["task"], row["variant"]) == ("curve", task, variant):
            by_step.setdefault(row["step"], []).append(row["value"])
    return [
        (step, statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for step, v in sorted(by_step.items())
    ]


def require_plots() -> None:
    """Raise MissingDependencyError where there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError('the plot needs matplotlib: pip install "vpd_fast[examples]"') from error


def plot(rows: Rows, path: Path) -> None:
    """Accuracy against steps, pre-trained and random, a panel per task. Raises MissingDependencyError."""
    require_plots()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, task in zip(figure.subplots(1, 3), TASKS, strict=True):
        for name, curve in curves_of(rows, task).items():
            if curve:
                color = {PRETRAINED: "tab:blue", RANDOM: "tab:orange"}[name]
                steps, means, deviations = zip(*curve, strict=True)
                axes.plot(steps, means, color=color, marker="o", markersize=3, label=name)
                low, high = ([m + s * d for m, d in zip(means, deviations, strict=True)] for s in (-1, 1))
                axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        metric = next((row["metric"] for row in rows if row["task"] == task), "")
        axes.set(title=task, xlabel="steps of fine-tuning", ylabel="RMSE in metres" if task == "depth" else metric)
        axes.grid(alpha=0.3)
        axes.legend()
    write_files({path: lambda temporary: figure.savefig(temporary, format="png", dpi=110)})


def write_report(rows: Rows, page: Path) -> None:
    """Put the tables between the page's marks, and the plot beside it. Raises InputError where there are no rows."""
    if not rows:
        raise InputError("there are no rows to report yet; run the analysis first")
    tables = {f"variants {task}": variants_table(rows, task) for task in TASKS}
    tables |= {"models": models_table(), "steps": steps_table(rows), "precision": precision_table(rows)}
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if begin not in text or end not in text:
            raise InputError(f"{page}: the marks {begin} and {end} are missing")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{table}\n\n{end}{rest.partition(end)[2]}"
    plot(rows, page.parent / "shapes-curves.png")
    write_files({page: lambda path: path.write_text(text, encoding="utf-8")})
