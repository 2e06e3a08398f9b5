"""Pictures of the table of accuracy, as SVG; without matplotlib there are none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.study.accuracy.scales import Scale

Result = dict[str, Any]
Axes = Any  # of matplotlib, which is imported where it is needed

SIZE = 7.0, 4.5  # inches

# A color for each family of methods, a mark for each kind of heads.
FAMILIES = {
    "end to end": ("end-to-end", "checkpointing", "1f1b"),
    "local only": ("local",),
    "PGL, single steps": ("pgl-",),
    "PGL otherwise": ("bursts", "epochs", "final", "warmup"),
    "windows": ("window-",),
    "stale windows": ("stale-window-",),
    "stale": ("stale-",),
    "variants of PGL 10 %": ("heads", "beside", "reset", "separate", "lr"),
}
MARKS = {
    **{"any": "*", "0c1f": "o", "1c2f": "s", "mlp-sr": "^", "infopro": "D"},
    **{"auglocal-1": "p", "auglocal-2": "P", "thin-3": "X", "man": "v", "solo": "<"},
    **{"2c2f": "h", "1c3f": "H"},
}


def draw(results: Sequence[Result], folder: Path, scale: Scale) -> list[Path]:
    """Draws what there are figures for; returns the files."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no pictures: pip install matplotlib", file=sys.stderr)
        return []
    matplotlib.use("svg")
    # The same figures give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "pglpipe"
    matplotlib.rcParams["svg.fonttype"] = "none"
    return [
        path
        for name, picture in PICTURES.items()
        if (path := _draw(picture, results, folder, f"accuracy_{scale.name}_{name}"))
    ]


Picture = Callable[[Axes, Sequence[Result]], bool]


def _draw(
    picture: Picture, results: Sequence[Result], folder: Path, name: str
) -> Path | None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
    path = folder / f"{name}.svg"
    found = picture(axes, results)
    if found:
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize="small")
        figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path if found else None


def against_stages(axes: Axes, results: Sequence[Result]) -> bool:
    """Accuracy against K, a line for each method that has several K with heads 1c2f."""
    lines: dict[str, dict[int, float]] = {}
    for found in results:
        if (found["head"], found["loss"]) == ("1c2f", "ce") and found["stages"] > 1:
            line = lines.setdefault(label(found), {})
            line[found["stages"]] = accuracy(found)
    lines = {name: line for name, line in lines.items() if len(line) > 2}
    for name, line in lines.items():
        axes.plot(*zip(*sorted(line.items()), strict=True), "o-", label=name)
    _level(axes, results)
    axes.set_xscale("log", base=2)
    axes.set_xticks([2, 4, 8, 16], ["2", "4", "8", "16"])
    axes.set(xlabel="stages, heads 1c2f", ylabel="test accuracy, %")
    return bool(lines)


def against_share(axes: Axes, results: Sequence[Result]) -> bool:
    """Accuracy against the share of global steps, a line for each place."""
    lines: dict[str, dict[float, float]] = {}
    for found in results:
        single = found["method"].startswith("pgl-") or found["method"] == "local"
        if single and found["loss"] == "ce":
            line = lines.setdefault(place(found), {})
            line[100 * found["share"]] = accuracy(found)
    lines = {name: line for name, line in lines.items() if len(line) > 2}
    for name, line in lines.items():
        axes.plot(*zip(*sorted(line.items()), strict=True), "o-", label=name)
    _level(axes, results)
    axes.set(xlabel="global steps, %", ylabel="test accuracy, %")
    return bool(lines)


def per_exit(axes: Axes, results: Sequence[Result]) -> bool:
    """Accuracy of every exit, for the deepest cut with heads 1c2f."""
    wanted = "local", "pgl-10", "pgl-50", "stale-1", "window-2"
    these = [r for r in results if (r["head"], r["loss"]) == ("1c2f", "ce")]
    deepest = max((found["stages"] for found in these), default=0)
    lines = [r for r in these if r["stages"] == deepest and r["method"] in wanted]
    for found in lines:
        exits = [100 * fmean(seeds) for seeds in zip(*found["exit_accuracy"])]
        axes.plot(range(1, deepest + 1), exits, "o-", label=label(found))
    _level(axes, results)
    axes.set(xlabel=f"exit of {deepest} stages, 1c2f", ylabel="test accuracy, %")
    return bool(lines)


def against_throughput(axes: Axes, results: Sequence[Result]) -> bool:
    """Accuracy against throughput, global steps in parts where they have any."""
    time = "time_microbatches"
    axes.set(xlabel="throughput on one worker per stage; end to end on one worker = 1")
    return _scatter(axes, results, lambda r: r[time] and 1 / r[time], higher=True)


def against_memory(axes: Axes, results: Sequence[Result]) -> bool:
    """Accuracy against what the worker that keeps most keeps for backward."""
    kept = "kept_bytes"
    axes.set(xlabel="kept for backward by the worker that keeps most, MiB")
    return _scatter(axes, results, lambda r: r[kept] and r[kept] / 2**20, higher=False)


PICTURES: dict[str, Picture] = {
    "stages": against_stages,
    "share": against_share,
    "exits": per_exit,
    "throughput": against_throughput,
    "memory": against_memory,
}


def label(found: Result) -> str:
    """A row in a few words."""
    single = found["method"].startswith("pgl-")
    return f"PGL {100 * found['share']:.0f} %" if single else str(found["title"])


def place(found: Result) -> str:
    """Cut and heads in a few words."""
    return f"K = {found['stages']}, {found['head']}"


def accuracy(found: Result) -> float:
    """Mean over the seeds, in percent."""
    return 100 * fmean(found["test_accuracy"])


def _level(axes: Axes, results: Sequence[Result]) -> None:
    """End to end as a line across."""
    for found in results:
        if found["method"] == "end-to-end":
            axes.axhline(accuracy(found), color="black", ls="--", label="end to end")


def _scatter(
    axes: Axes,
    results: Sequence[Result],
    x: Callable[[Result], float | None],
    *,
    higher: bool,
) -> bool:
    """A point for each row of the deepest cut; those that none beats in both are named.

    Args:
        higher: whether more of x is better.
    """
    deepest = max((found["stages"] for found in results), default=0)
    points = [
        (value, accuracy(found), found)
        for found in results
        if found["stages"] in (1, deepest) and (value := x(found)) is not None
    ]
    for value, height, found in points:
        axes.plot(value, height, marker(found), color=f"C{family(found)}", alpha=0.8)
    sign = 1 if higher else -1
    for value, height, found in points:
        if not any(sign * v > sign * value and h > height for v, h, _ in points):
            name, place = label(found), (value, height)
            offset = {"xytext": (4, 3), "textcoords": "offset points"}
            axes.annotate(name, place, **offset, fontsize=7)
    _legend(axes, [found for _, _, found in points])
    axes.set(ylabel=f"test accuracy, %; {deepest} stages")
    return bool(points)


def family(found: Result) -> int:
    """The number of a method's family."""
    for number, members in enumerate(FAMILIES.values()):
        if found["method"].startswith(members):
            return number
    raise ValueError(f"no family for {found['method']}")


def marker(found: Result) -> str:
    """The mark of a row's heads."""
    if found["stages"] == 1:
        return MARKS["any"]
    return MARKS["infopro" if found["loss"] == "infopro" else found["head"]]


def _legend(axes: Axes, shown: Sequence[Result]) -> None:
    """Names the colors and the marks that are there."""
    families = {family(found) for found in shown}
    for number, name in enumerate(FAMILIES):
        if number in families:
            axes.plot([], [], "s", color=f"C{number}", label=name)
    marks = {marker(found) for found in shown}
    for name, mark in MARKS.items():
        if mark in marks and name != "any":
            axes.plot([], [], mark, color="gray", label=name)
