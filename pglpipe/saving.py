"""How checkpoints come about, on either side: who writes stages, and who makes a checkpoint of them.

Nobody waits for a disk. A worker copies its stages when the command reaches it, between two
steps, and a thread writes the copies while training goes on; the coordinator makes a checkpoint of the
files when the last worker has reported, and only then asks for another. A disk that never answers keeps
no run from its end: it loses what was to be written there::

    coordinator   Checkpoint ───────────────────────────▶ manifest ─▶ prune
    worker 0         copy │ step │ step │ step        ▲
                      └─ write, fsync, hash ─ report ──┤
    worker 1              copy │ step │ step │ step   │
                           └─ write, fsync, hash ─ report
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pglpipe import checkpoint
from pglpipe.checkpoint import Manifest, Written, folder_of, write_stage
from pglpipe.commands import Checkpoint
from pglpipe.errors import ConfigError, DataError, warn
from pglpipe.reports import SavedReport
from pglpipe.snapshot import Snapshot

# After so long, a disk that has not taken a checkpoint counts as one that does not answer.
STUCK_SECONDS = 120.0


@dataclass(frozen=True)
class Checkpoints:
    """Where, when and how many.

    Attributes:
        folder: of all checkpoints of a run; every worker must see it.
        every: steps from one to the next; 0 for none that is counted so.
        minutes: the same by the clock.
        keep: the newest that are kept.
        about: whatever else is to stand in the manifest; JSON must be able to hold it.

    Raises:
        ConfigError: a number is out of its range.
    """

    folder: Path
    every: int = 0
    minutes: float = 0.0
    keep: int = 2
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for option, value, least in (
            ("checkpoint-every", self.every, 0),
            ("checkpoint-minutes", self.minutes, 0),
            ("keep-checkpoints", self.keep, 1),
        ):
            if not value >= least:
                raise ConfigError(
                    f"expected --{option} of at least {least}, got {value:g}"
                )


def chosen(told: Checkpoints | None, resume: Path | str | None) -> Path | None:
    """The checkpoint to go on from; one that is not as it was written is told and left aside.

    Args:
        resume: a checkpoint's folder, ``"auto"`` for the newest that is whole, or None for none.

    Raises:
        DataError: the one is damaged, or all are.
        ConfigError: the folder holds checkpoints that the run does not go on from.
    """
    one = Path(resume) if resume is not None and resume != "auto" else None
    if one:
        checkpoint.examine(one)
    if told is None:
        return one
    found, errors = checkpoint.newest(told.folder)
    if resume != "auto":
        _check_nothing_newer(found, one)
        return one
    damaged = [e for e in errors if not isinstance(e, checkpoint.Unfinished)]
    # A run that is killed leaves one unfinished: others have been finished, and lost their manifests.
    if found is None and (damaged or len(errors) > 1):
        raise DataError(
            f"expected a checkpoint in {told.folder} that is whole, got none: "
            f"{'; '.join(map(str, errors))}; begin anew in another folder"
        )
    for error in errors:
        warn(f"a checkpoint is not used: {error}")
    return found


def _check_nothing_newer(found: Path | None, one: Path | None) -> None:
    """What is found of another run would be taken for this run's newest checkpoint later."""
    if found and (one is None or found.resolve() != one.resolve()):
        raise ConfigError(
            f"expected a folder for checkpoints without those of another run, but {found} is there; "
            'choose another folder, or resume="auto" to go on with that run'
        )


class Writer:
    """Writes what one worker's stages are at a moment, in a thread.

    One checkpoint at a time, so that no more than one copy of the stages is in memory.

    Args:
        root: the folder of all checkpoints.
        rank: the worker's.
        post: sends a report on its way.
    """

    def __init__(
        self, root: Path, rank: int, post: Callable[[SavedReport], None]
    ) -> None:
        self._root = root
        self._rank = rank
        self._post = post
        self._thread: threading.Thread | None = None
        self._began = 0.0

    def write(self, step: int, stages: Mapping[int, Snapshot]) -> None:
        """Begins to write copies of the stages."""
        self.finish()
        self._thread = threading.Thread(
            target=self._run, args=(step, stages), name="pglpipe checkpoint"
        )
        # A run that fails does not wait for a disk; one that ends well does, in finish.
        self._thread.daemon = True
        self._began = time.monotonic()
        self._thread.start()

    def finish(self) -> None:
        """Waits until all is written and reported, or the disk counts as one that does not answer."""
        if self._thread is not None:
            waited = time.monotonic() - self._began
            self._thread.join(max(0.0, STUCK_SECONDS - waited))
            self._thread = None

    def _run(self, step: int, stages: Mapping[int, Snapshot]) -> None:
        folder, files, error = folder_of(self._root, step), list[Written](), ""
        try:
            for index, snapshot in stages.items():
                files.append(write_stage(folder, index, snapshot))
        except Exception as reason:  # whatever it is, worker 0 waits to hear of it
            said = str(reason) or type(reason).__name__
            error = f"rank {self._rank} cannot write to {folder}: {said}"
        numbers = {index: snapshot.numbers for index, snapshot in stages.items()}
        written = [asdict(file) for file in files]
        self._post(SavedReport(self._rank, step, written, numbers, error))


class Ledger:
    """Says when a checkpoint is due, and makes it when all have written their part.

    Args:
        told: where, when and how many.
        num_workers: who are to report.
    """

    def __init__(self, told: Checkpoints, num_workers: int) -> None:
        self._told = told
        self._num_workers = num_workers
        self._last_step = 0
        self._last_time = time.monotonic()
        self._pending: Manifest | None = None
        self._told_stuck = False
        self._reports: list[SavedReport] = []

    def resumed(self, step: int) -> None:
        """A run goes on from the checkpoint after so many steps."""
        self._last_step = step

    def due(self, step: int) -> bool:
        """Whether one should be made after so many steps.

        One that is due while the one before is still being written is made right after that.
        """
        told = self._told
        if self.is_stuck and not self._told_stuck:
            self._told_stuck = True
            warn(
                f"the checkpoint after step {self._last_step} has not been written for {STUCK_SECONDS:g} s by "
                f"{self._missing()}; training goes on, and no other is made before it"
            )
        if self.is_busy or self.has(step):
            return False
        counted = told.every and step // told.every > self._last_step // told.every
        passed = time.monotonic() - self._last_time
        return bool(counted or (told.minutes and passed >= 60 * told.minutes))

    @property
    def is_busy(self) -> bool:
        """Whether one is being written."""
        return self._pending is not None

    @property
    def is_stuck(self) -> bool:
        """Whether one has been under way for longer than any disk should take."""
        return self.is_busy and time.monotonic() > self._last_time + STUCK_SECONDS

    def has(self, step: int) -> bool:
        """Whether the last one was made after so many steps."""
        return step == self._last_step

    def begin(self, step: int, manifest: Manifest) -> Checkpoint:
        """The command that has all workers write their part; the manifest lacks theirs."""
        checkpoint.sweep(self._told.folder)
        checkpoint.discard(folder_of(self._told.folder, step))
        self._pending = {**self._told.about, **manifest}
        self._last_step, self._last_time = step, time.monotonic()
        self._told_stuck = False
        return Checkpoint(step)

    def add(self, report: SavedReport, more: Callable[[int], Manifest]) -> None:
        """Takes a worker's report; the last one completes the checkpoint.

        Args:
            more: what is to stand in the manifest after so many steps and was not known before.
        """
        self._reports.append(report)
        if len(self._reports) < self._num_workers:
            return
        reports, self._reports = self._reports, []
        pending, self._pending = self._pending, None
        assert pending is not None, "nobody reports unasked"
        folder = folder_of(self._told.folder, report.step)
        try:
            if errors := [r.error for r in reports if r.error]:
                raise OSError(errors[0])
            files = [Written(**file) for r in reports for file in r.files]
            numbers = {index: n for r in reports for index, n in r.numbers.items()}
            stages = [numbers[index] for index in sorted(numbers)]
            manifest = {**pending, **more(report.step), "stages": stages}
            checkpoint.commit(folder, manifest, files)
        except OSError as error:
            checkpoint.discard(folder)
            warn(
                f"no checkpoint after step {report.step}: {error}; training goes on, and the last good "
                "checkpoint stays"
            )
            return
        try:
            checkpoint.prune(self._told.folder, self._told.keep, folder)
        except OSError as error:
            warn(f"older checkpoints than {folder} stay: {error}")

    def _missing(self) -> str:
        """Who has not written its part yet."""
        there = {report.rank for report in self._reports}
        missing = [str(r) for r in range(self._num_workers) if r not in there]
        return f"rank {', '.join(missing)}"
