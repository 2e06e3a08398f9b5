"""From finished runs to the table of accuracy: what a row says, as JSON and as Markdown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.runs import CIFAR10, machine
from benchmarks.study.accuracy.prices import (
    MICROBATCHES,
    Result,
    checkpointed,
    costs,
    pipelined,
)
from benchmarks.study.accuracy.rows import Row
from benchmarks.study.accuracy.runs import Run, Runs, has_options, in_folder, in_table
from benchmarks.study.accuracy.scales import Scale
from benchmarks.study.accuracy.stages import known_places, stages_path

SEEDS = range(10)  # that are looked for
TRY = "try-"  # names of folders beside the rows begin so
TOLD = "options.json"  # in such a folder


@dataclass(frozen=True)
class Tables:
    """Where runs are read and tables are written.

    Attributes:
        runs: the folder of the runs.
        results: the folder of the tables.
    """

    scale: Scale
    runs: Path
    results: Path

    def folder(self, name: str, seed: int) -> Path:
        """Of one run."""
        return self.runs / self.scale.name / f"{name}-seed{seed}"

    @property
    def path(self) -> Path:
        """Of the JSON file."""
        return self.results / f"accuracy_{self.scale.name}.json"

    def write(self, rows: Sequence[Row]) -> list[Result]:
        """Writes what is known by now."""
        before = in_table(self.path, "runs")
        runs = {row.name: self.complete(row, before.get(row.name, {})) for row in rows}
        runs = {name: known for name, known in runs.items() if known}
        results = [*self.found(rows, runs)]
        close_gaps(results)
        tries = self.tried()
        self.results.mkdir(exist_ok=True)
        about = {
            "command": f"python -m benchmarks.study.accuracy --scale {self.scale.name} --data-root DIR",
            "data": CIFAR10,
            "options": self.scale.common,
            "machine": machine(),
        }
        all_ = {**about, "rows": results, "runs": runs, "tries": tries}
        self.path.write_text(json.dumps(all_, indent=1) + "\n")
        text = markdown(results, heading(self.scale)) + beside(tries)
        self.path.with_suffix(".md").write_text(text)
        return results

    def found(
        self, rows: Iterable[Row], known_runs: Mapping[str, Runs]
    ) -> Iterable[Result]:
        """The rows of which there is a run."""
        known = known_places(stages_path(self.results, self.scale))
        for row in rows:
            if row.name not in known_runs:
                continue
            runs = known_runs[row.name]
            place = known.get(row.place)
            yield {**result(row, runs), **costs(self.scale, row, place)}
            if row.stages > 1 or place is None:
                continue
            yield {**result(row, runs), **checkpointed(place)}
            cuts = {len(place["body"]): place for place in known.values()}
            for stages in sorted(cuts.keys() - {1}):
                yield {**result(row, runs), **pipelined(cuts[stages])}

    def complete(self, row: Row, before: Runs) -> dict[int, Run]:
        """Its finished runs, by seed: those in their folders, and what the table knew before."""
        found = {}
        for seed in SEEDS:
            options, known = row.options(self.scale, seed), before.get(seed)
            if run := in_folder(self.folder(row.name, seed), options):
                found[seed] = run
            elif known and has_options(known, options):
                found[seed] = known
        return found

    def tried(self) -> dict[str, dict[int, Run]]:
        """Runs beside the rows, by name and seed, and what was typed for them."""
        found = in_table(self.path, "tries")
        for path in sorted((self.runs / self.scale.name).glob(f"{TRY}*/{TOLD}")):
            name, _, seed = path.parent.name.removeprefix(TRY).rpartition("-seed")
            options = json.loads(path.read_text())
            if run := in_folder(path.parent, options["all"]):
                found.setdefault(name, {})[int(seed)] = {**run, "told": options["told"]}
        return dict(sorted(found.items()))


def result(row: Row, runs: Runs) -> Result:
    """What the runs of a row say."""
    first = next(iter(runs.values()))
    return {
        "name": row.name,
        "title": row.title,
        "method": row.method,
        "stages": row.stages,
        "head": row.head,
        "loss": row.loss,
        "share": first["global_steps"] / first["steps"],
        "seeds": list(runs),
        **{
            key: [run[key] for run in runs.values()]
            for key in (
                "test_accuracy",
                "best_accuracy",
                "exit_accuracy",
                "gradient_cosine",
                "parameters_sha256",
            )
        },
    }


def close_gaps(results: Sequence[Result]) -> None:
    """Adds to each result the part of a gap that it closes, where the ends are known.

    The gap is between local training and end to end, over the seeds that all three have: local training
    at the same place, and for ``cheap_gap_closed`` with :data:`CHEAP` heads, which have a gap to close
    where better ones have none.
    """
    by_name = {found["name"]: found for found in results}
    for found in results:
        place = found["stages"], found["head"], found["loss"]
        whole = by_name.get("end-to-end")
        for key, row in (
            ("gap_closed", Row("local", *place)),
            ("cheap_gap_closed", Row("local", found["stages"], CHEAP)),
        ):
            local, found[key] = by_name.get(row.name), None
            if local and whole and found["stages"] > 1:
                found[key] = gap_closed(found, local, whole)


def gap_closed(found: Result, local: Result, whole: Result) -> float | None:
    """The part of the way from local to end to end; None if there is no gap to speak of."""
    by_seed = [
        dict(zip(one["seeds"], one["test_accuracy"], strict=True))
        for one in (found, local, whole)
    ]
    common = set.intersection(*map(set, by_seed))
    if not common:
        return None
    mine, low, high = (
        statistics.fmean(one[seed] for seed in common) for one in by_seed
    )
    return (mine - low) / (high - low) if high > low else None


def heading(scale: Scale) -> str:
    """What stands above the table."""
    how = "as published" if scale.balance == "published" else f"by {scale.balance}"
    several = f"{scale.train:,} training and {scale.test:,} test images"
    return (
        f"{CIFAR10}, {several} of {scale.side}x{scale.side} pixels; {scale.model}"
        f"{f' at width {scale.width}' if scale.width else ''}, cut {how}; {scale.epochs} epochs, "
        f"batch {scale.batch}, cosine from lr {scale.options['lr']}. Accuracy of the last exit after the last epoch, and at "
        "best over the evaluations; ± standard deviation over seeds. *Gap*: the part of the way from local only with "
        f"the same cut and heads to end to end, and with the heads {CHEAP}. *Step*: time of a step on one worker per stage, end to end on one "
        "worker being 1, worked out from measured times of the layers, a third of them forward (benchmarks/study/accuracy/cost.py says how), for "
        f"whole batches as trained, and for {MICROBATCHES} microbatches in global steps, with which BatchNorm would see an eighth "
        "of a batch. *Kept*: for backward, by the worker that keeps most, at whole batches.\n\n"
        f"`python -m benchmarks.study.accuracy --scale {scale.name} --data-root DIR`; {machine()}."
    )


CHEAP = "1c2f"  # the better of the published heads that cost little

COLUMNS = (
    "K",
    "head",
    "method",
    "guided",
    "accuracy",
    "best",
    "gap closed",
    f"of {CHEAP}'s",
    "step",
    f"step, {MICROBATCHES} parts",
    "kept, MiB",
    "seeds",
)


def markdown(results: Iterable[Result], head: str) -> str:
    """The table, place by place."""
    ordered = sorted(
        results, key=lambda r: (r["stages"], r["head"], r["loss"], r["share"] > 0)
    )
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, ordered)]
    table = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "", *table, ""])


def beside(tries: Mapping[str, Runs]) -> str:
    """What was tried beside the rows, with the options by which it differs from all of them."""
    lines = [
        f"| {name} | {_told(runs)} | {percent([run['test_accuracy'] for run in runs.values()])} | "
        f"{', '.join(map(str, runs))} |"
        for name, runs in tries.items()
        if runs
    ]
    head = ["", "Tried beside the table:", "", "| name | options | accuracy | seeds |"]
    return "\n".join([*head, "| --- | --- | --- | --- |", *lines, ""]) if lines else ""


def _told(runs: Runs) -> str:
    """The options of a try, as they are typed."""
    options = next(iter(runs.values()))["told"]
    return " ".join(
        f"{key.replace('-', '_')}={value}" for key, value in options.items()
    )


def cells(found: Result) -> list[str]:
    """A line of the table, in the order of :data:`COLUMNS`."""
    alone = found["stages"] == 1
    bytes_ = found["kept_bytes"]
    return [
        "any" if alone else str(found["stages"]),
        "any" if alone else found["head"],
        found["title"],
        f"{100 * found['share']:.0f} %",
        percent(found["test_accuracy"]),
        percent(found["best_accuracy"]),
        _shown(found["gap_closed"], ".0%"),
        _shown(found["cheap_gap_closed"], ".0%"),
        _shown(found["time"], ".3f"),
        _shown(found["time_microbatches"], ".3f"),
        _shown(bytes_ and bytes_ / 2**20, ".1f"),
        str(len(found["seeds"])),
    ]


def percent(values: Sequence[float]) -> str:
    """Mean and standard deviation of fractions.

    >>> percent([0.5, 0.6]), percent([0.5])
    ('55.0 ± 7.1 %', '50.0 %')
    """
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread} %"


def _shown(value: float | None, how: str) -> str:
    return "–" if value is None else format(value, how)
