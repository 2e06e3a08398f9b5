"""How checkpoints come about, on either side: who writes stages, and who makes a checkpoint of them.

No step waits for a checkpoint. A worker copies its stages when the command reaches it, between two
steps, and a thread writes the copies while training goes on; the coordinator has another thread make a checkpoint of the
files when the last worker has reported, and only then asks for the next. The end of a run waits for the
last one, however slow the disk::

    coordinator   Checkpoint ───────────────────────────▶ manifest ─▶ prune
    worker 0         copy │ step │ step │ step        ▲
                      └─ write, fsync, hash ─ report ──┤
    worker 1              copy │ step │ step │ step   │
                           └─ write, fsync, hash ─ report
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pglpipe.checkpoint import disk as checkpoint
from pglpipe.checkpoint.disk import Manifest, Written, folder_of, write_stage
from pglpipe.errors import ConfigError, DataError, setting, warn
from pglpipe.messages.commands import Checkpoint
from pglpipe.messages.reports import SavedReport
from pglpipe.utils.arguments import number, path, whole
from pglpipe.utils.options import Section, option
from pglpipe.utils.snapshot import Snapshot

# After so long, a checkpoint that is not there is reported, and a run that is to end makes no other.
STUCK_SECONDS = 120.0


@dataclass(frozen=True)
class Checkpoints(Section, title="Checkpoints"):
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

    folder: Path = Path("checkpoints")
    every: int = option(
        0,
        "steps from one checkpoint to the next; 0 for none by steps",
        whole(0),
        name="checkpoint_every",
        common=True,
    )
    minutes: float = option(
        0.0,
        "minutes from one checkpoint to the next; 0 for none by the clock",
        number(0),
        name="checkpoint_minutes",
    )
    keep: int = option(
        2, "newest checkpoints that are kept", whole(1), name="keep_checkpoints"
    )
    about: Mapping[str, Any] = field(default_factory=dict)

    def resolve(self) -> None:
        """A folder may be given as a text."""
        self._set(folder=path()(setting("folder"), self.folder))


def chosen(policy: Checkpoints | None, resume: Path | str | None) -> Path | None:
    """The checkpoint to go on from; one that is not as it was written is reported and left aside.

    Args:
        resume: a checkpoint's folder, ``"auto"`` for the newest that is whole, or None for none.

    Raises:
        DataError: the one is damaged, or all are.
        ConfigError: the folder holds checkpoints that the run does not go on from.
    """
    one = Path(resume) if resume is not None and resume != "auto" else None
    found, errors = checkpoint.newest(policy.folder) if policy else (None, [])
    if one and not _same(found, one):  # else it has just been read
        checkpoint.examine(one)
    if policy is None:
        return one
    if resume != "auto":
        _check_nothing_newer(found, one)
        return one
    damaged = [e for e in errors if not isinstance(e, checkpoint.Unfinished)]
    if found is None and damaged:
        unreadable = any(isinstance(e, checkpoint.Unreadable) for e in damaged)
        remedy = "make it readable" if unreadable else "begin anew in another folder"
        raise DataError(
            f"expected a checkpoint in {policy.folder} that is whole, got none: "
            f"{'; '.join(map(str, damaged))}; {remedy}"
        )
    for error in errors:
        warn(f"a checkpoint is not used: {error}")
    return found


def _check_nothing_newer(found: Path | None, one: Path | None) -> None:
    """What is found of another run would be taken for this run's newest checkpoint later."""
    if found and not _same(found, one):
        raise ConfigError(
            f"expected a folder for checkpoints without those of another run, but {found} is there; "
            f"choose another folder, or {setting('resume', 'auto')} to go on with that run"
        )


def _same(one: Path | None, other: Path | None) -> bool:
    return bool(one and other and one.resolve() == other.resolve())


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

    def write(self, step: int, stages: Mapping[int, Snapshot]) -> None:
        """Begins to write copies of the stages."""
        self.finish()
        self._thread = _begin(self._run, step, stages)

    def finish(self) -> None:
        """Waits until all is written and reported."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, step: int, stages: Mapping[int, Snapshot]) -> None:
        folder, files, error = folder_of(self._root, step), list[Written](), ""
        try:
            for index, snapshot in stages.items():
                files.append(write_stage(folder, index, snapshot))
        except Exception as reason:  # whatever it is, worker 0 waits for it
            said = str(reason) or type(reason).__name__
            error = f"rank {self._rank} cannot write to {folder}: {said}"
        numbers = {index: snapshot.numbers for index, snapshot in stages.items()}
        written = [asdict(file) for file in files]
        self._post(SavedReport(self._rank, step, written, numbers, error))


class CheckpointCoordinator:
    """Says when a checkpoint is due, and makes it when all have written their part.

    Args:
        policy: where, when and how many.
        num_workers: who are to report.
    """

    def __init__(self, policy: Checkpoints, num_workers: int) -> None:
        self._policy = policy
        self._num_workers = num_workers
        self._last_step = 0
        self._last_time = time.monotonic()
        self._pending: Manifest | None = None
        self._reports: list[SavedReport] = []
        self._made = threading.Event()
        self._complaint = ""
        self._is_told_of = False

    def resumed(self, step: int) -> None:
        """A run goes on from the checkpoint after so many steps."""
        self._last_step = step

    def due(self, step: int, *, is_last: bool = False) -> bool:
        """Whether one should be made after so many steps.

        One that is due while the one before is still being written is made after that, at the latest at the end.

        Args:
            is_last: whether one is asked for at once, as where the run ends with this step.
        """
        policy = self._policy
        if self.is_busy or self.has(step):
            return False
        counted = (
            policy.every and step // policy.every > self._last_step // policy.every
        )
        passed = time.monotonic() - self._last_time
        return bool(
            is_last or counted or (policy.minutes and passed >= 60 * policy.minutes)
        )

    @property
    def is_busy(self) -> bool:
        """Whether one is being written."""
        return self._pending is not None

    @property
    def is_stuck(self) -> bool:
        """Whether that has taken longer than most disks do."""
        return self.is_busy and time.monotonic() > self._last_time + STUCK_SECONDS

    def has(self, step: int) -> bool:
        """Whether the last one was made after so many steps."""
        return step == self._last_step

    def begin(self, step: int, manifest: Manifest) -> Checkpoint:
        """The command that has all workers write their part; the manifest lacks theirs."""
        checkpoint.discard(folder_of(self._policy.folder, step))
        self._pending = {**self._policy.about, **manifest}
        self._last_step, self._last_time = step, time.monotonic()
        self._complaint, self._is_told_of = "", False
        self._made.clear()
        return Checkpoint(step)

    def add(self, report: SavedReport, more: Callable[[int], Manifest]) -> None:
        """Takes a worker's report; after the last one the checkpoint is made, in a thread.

        Args:
            more: what is to stand in the manifest after so many steps and was not known before.
        """
        assert self._pending is not None, "nobody reports unasked"
        self._reports.append(report)
        if len(self._reports) == self._num_workers:
            manifest = {**self._pending, **more(report.step)}
            _begin(self._make, report.step, manifest, list(self._reports))

    def listen(self) -> None:
        """Takes in what has become of the one under way, and reports what went wrong."""
        if self._made.is_set() and self.is_busy:
            self._pending, self._reports = None, []
            if self._complaint:
                warn(self._complaint)
        elif self.is_stuck and not self._is_told_of:
            self._is_told_of = True
            warn(
                f"the checkpoint after step {self._last_step} is not there after {STUCK_SECONDS:g} s: "
                f"{self._doing()}; training goes on, and no other is made before it"
            )

    def _make(
        self, step: int, manifest: Manifest, reports: Sequence[SavedReport]
    ) -> None:
        folder = folder_of(self._policy.folder, step)
        try:
            if errors := [r.error for r in reports if r.error]:
                raise OSError(errors[0])
            files = [Written(**file) for r in reports for file in r.files]
            numbers = {index: n for r in reports for index, n in r.numbers.items()}
            stages = [numbers[index] for index in sorted(numbers)]
            checkpoint.commit(folder, {**manifest, "stages": stages}, files)
        except Exception as error:
            checkpoint.discard(folder)
            self._complaint = (
                f"no checkpoint after step {step}: {error}; training goes on, and the last good checkpoint "
                "stays"
            )
        else:
            self._prune(folder)
        self._made.set()

    def _prune(self, newest: Path) -> None:
        try:
            checkpoint.prune(self._policy.folder, self._policy.keep, newest)
        except OSError as error:
            self._complaint = f"older checkpoints than {newest} stay: {error}"

    def _doing(self) -> str:
        """Who has not written its part yet."""
        there = {report.rank for report in self._reports}
        missing = [str(r) for r in range(self._num_workers) if r not in there]
        if not missing:
            return "its manifest is being written"
        return f"rank {', '.join(missing)} still writes"


def _begin(work: Callable[..., None], *given: object) -> threading.Thread:
    """Does it in a thread; a run that fails does not wait for a disk."""
    name = "pglpipe checkpoint"
    thread = threading.Thread(target=work, args=given, name=name, daemon=True)
    thread.start()
    return thread
