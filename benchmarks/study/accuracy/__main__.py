"""``python -m benchmarks.study.accuracy``: what guidance buys on real images, and what it costs.

Every row of the table is one ordinary command for each seed, in a folder of its own; what is
complete there is not run again, so the table can be interrupted, and grows over days::

    python -m benchmarks.study.accuracy --scale small --data-root DIR             all rows, seed by seed
    python -m benchmarks.study.accuracy --scale small --data-root DIR --rows pgl-10-k8-1c2f,local-k8-1c2f
    python -m benchmarks.study.accuracy --scale small --only measure              times of the stages
    python -m benchmarks.study.accuracy --scale small --only report               the tables alone
    python -m benchmarks.study.accuracy --scale small --data-root DIR \\
        --try mine:guidance_reach=stale,guidance_delay=2,stages=16          one run beside the table

Writes results/accuracy_SCALE.json, .md and pictures. The accuracy of a run does not depend on how
busy the machine is, so several may run at once; the times of the stages do, and are measured apart.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from benchmarks.common.runs import matches, one_of, refuse, train
from benchmarks.common.tables import RESULTS
from benchmarks.study.accuracy.rows import Row, place_options, rows
from benchmarks.study.accuracy.runs import in_folder, read_run
from benchmarks.study.accuracy.scales import SCALES, Options, Scale
from benchmarks.study.accuracy.stages import measure_places, stages_path
from benchmarks.study.accuracy.table import TOLD, TRY, Tables
from pglpipe.app.run_directory import RunDirectory
from pglpipe.checkpoint.disk import folder_of

RUNS = Path("runs/accuracy")


def tasks(rows: Sequence[Row], seeds: Sequence[int] = ()) -> list[tuple[Row, int]]:
    """What is to be run, in order: seed by seed, so that every row is there before the spread.

    Args:
        seeds: instead of the rows' own.
    """
    wanted = seeds or sorted({seed for row in rows for seed in row.seeds})
    return [
        (row, seed) for seed in wanted for row in rows if seeds or seed in row.seeds
    ]


def run(
    folder: Path, options: Options, data_root: Path, more: Options | None = None
) -> bool:
    """Trains what is not there yet; whether it is there then.

    Args:
        more: options that change no number.
    """
    summary = folder / "summary.json"
    if summary.exists() and matches(summary, options):
        return True
    print(f"{time.strftime('%H:%M:%S')} {folder.name}", flush=True)
    try:
        every = {**options, **(more or {}), "data-root": data_root}
        train(folder, every, workers=1)
    except subprocess.CalledProcessError as error:
        print(f"{folder.name} ended with status {error.returncode}", flush=True)
        return False
    return True


def run_row(tables: Tables, row: Row, seed: int, data_root: Path) -> bool:
    """Trains a row for one seed, unless it is there; whether it is there then.

    What begins as local learning goes on from a checkpoint of that row, where there is one: to the
    bit as if it had done those steps itself.
    """
    scale, more = tables.scale, Options()
    if row.method == "local":
        more = {"checkpoint-every": scale.twentieth, "keep-checkpoints": 12}
    elif steps := row.local_steps(scale):
        before = tables.folder(row.local.name, seed)
        found = folder_of(before / RunDirectory.CHECKPOINTS, steps)
        is_whole = in_folder(before, row.local.options(scale, seed))
        if is_whole and (found / "manifest.json").exists():
            more = {"resume": found}
    folder = tables.folder(row.name, seed)
    return run(folder, row.options(scale, seed), data_root, more)


def run_all(
    tables: Tables, chosen: Iterable[tuple[Row, int]], data_root: Path, jobs: int
) -> bool:
    """Trains what is missing, and writes the tables after each; whether all went well."""
    scale, fine = tables.scale, True
    with ThreadPoolExecutor(jobs) as pool:
        futures = [
            pool.submit(run_row, tables, row, seed, data_root) for row, seed in chosen
        ]
        for future in futures:
            fine &= future.result()
            tables.write(rows(scale))
    return fine


def attempt(tables: Tables, name: str, options: str, data_root: Path, seed: int) -> str:
    """Trains once what no row says; a line about it."""
    given = parsed(options)
    place = {
        key: given.pop(key, default)
        for key, default in (("stages", 8), ("head", "1c2f"), ("local-loss", "ce"))
    }
    stages, head, loss = int(place["stages"]), place["head"], place["local-loss"]
    found = {**place_options(tables.scale, stages, head, loss), **given, "seed": seed}
    folder = tables.folder(TRY + name, seed)
    if not run(folder, found, data_root):
        raise SystemExit(1)
    typed = {"told": {**place, **given}, "all": found}
    (folder / TOLD).write_text(json.dumps(typed) + "\n")
    tables.write(rows(tables.scale))
    summary = read_run(folder)
    return (
        f"{name} (seed {seed}): {100 * summary['test_accuracy']:.2f} %, best {100 * summary['best_accuracy']:.2f} %, "
        f"{summary['guided_steps']} of {summary['steps']} steps guided, {summary['wall_seconds']:.0f} s"
    )


def parsed(options: str) -> dict[str, Any]:
    """Options as they are typed; a comma belongs to a value unless a name and = follow.

    >>> parsed("stages=16,infopro_lambdas=5,0,0,2")
    {'stages': '16', 'infopro-lambdas': '5,0,0,2'}
    """
    words = re.split(r",(?=[a-z_-]+=)", options) if options else []
    pairs = [word.partition("=") for word in words]
    return {key.replace("_", "-"): value for key, _, value in pairs}


def chosen_rows(scale: Scale, names: str) -> list[Row]:
    """The rows that were named, or all."""
    known = rows(scale)
    asked = [name for name in names.split(",") if name]
    one_of("row", asked, [row.name for row in known])
    return [row for row in known if row.name in asked] if asked else known


def main(
    scale: Annotated[str, typer.Option(help=", ".join(SCALES))] = "small",
    data_root: Annotated[
        Optional[Path], typer.Option(help="CIFAR-10 as an image folder")
    ] = None,
    names: Annotated[str, typer.Option("--rows", help="these rows alone")] = "",
    seeds: Annotated[str, typer.Option(help="instead of the rows' own")] = "",
    jobs: Annotated[int, typer.Option(help="runs at a time, one thread each")] = 1,
    only: Annotated[
        str, typer.Option(help="measure: time the stages; report: only write")
    ] = "",
    attempted: Annotated[
        str, typer.Option("--try", help="a run beside the table: NAME:key=value,…")
    ] = "",
    folder: Annotated[Path, typer.Option(help="where the runs go")] = RUNS,
) -> None:
    """Runs what is missing and writes tables and pictures."""
    one_of("scale", [scale], SCALES)
    tables = Tables(SCALES[scale], folder, RESULTS)
    known = chosen_rows(tables.scale, names)
    numbers = [int(seed) for seed in seeds.split(",") if seed]
    if only:
        one_of("--only", [only], ["measure", "report"])
    if only == "measure":
        measure_places(tables.scale, known, stages_path(RESULTS, tables.scale))
    if only:
        write(tables)
        return
    if data_root is None:
        refuse("expected --data-root for runs, got none")
    if attempted:
        name, _, options = attempted.partition(":")
        for seed in numbers or [0]:
            print(attempt(tables, name, options, data_root, seed))
        return
    fine = run_all(tables, tasks(known, numbers), data_root, jobs)
    write(tables)
    raise SystemExit(not fine)


def write(tables: Tables) -> None:
    """The tables, and pictures of them."""
    from benchmarks.study.accuracy.pictures import draw  # matplotlib takes a while

    draw(tables.write(rows(tables.scale)), tables.results, tables.scale)


if __name__ == "__main__":
    typer.run(main)
