"""What a run leaves on disk.

::

    RUN_DIR/
      config.toml         everything resolved: the same run again is --config of this file
      metrics.jsonl       one line per step and evaluation, as they complete
      checkpoints/        from which the run can go on (pglpipe.checkpoint.disk)
      model.safetensors   the weights at the end, of the network and of the heads
      summary.json        how it went; its presence says that the run is complete
"""

from __future__ import annotations

import dataclasses
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from pglpipe.__version__ import __version__
from pglpipe.app.config import RunConfig
from pglpipe.app.journal import Journal
from pglpipe.errors import ConfigError, DataError
from pglpipe.observe.records import EvaluationRecord, StepRecord, Summary

# What a summary says of images, and of text.
_ABOUT = ("classes", "mean", "std", "context", "vocabulary", "bytes_per_token")


class RunDirectory:
    """An observer that writes what it sees.

    Args:
        path: the folder; made by :meth:`open`, claimed by :meth:`claim` before anything there is read.

    Attributes:
        chosen: the configuration of the run, before it begins.

    Raises:
        ConfigError: the folder cannot be written, or another run is writing there.
    """

    WEIGHTS = "model.safetensors"
    SETTINGS = "config.toml"
    SUMMARY = "summary.json"
    CHECKPOINTS = "checkpoints"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.chosen: RunConfig | None = None
        self._metrics: Journal | None = None
        self._is_claimed = False
        parent = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not (parent.is_dir() and os.access(parent, os.W_OK)):
            self._refuse(f"{parent} cannot be written")

    def _refuse(self, reason: str | None) -> NoReturn:
        raise ConfigError(
            f"expected a run directory that can be written, but {self.path}: {reason}; "
            "choose another --run-dir"
        )

    @property
    def weights(self) -> Path:
        """Where the weights at the end go."""
        return self.path / self.WEIGHTS

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints go."""
        return self.path / self.CHECKPOINTS

    def on_begin(self, step: int, total_steps: int) -> None:
        """Opens the folder, with the configuration that was :attr:`chosen`."""
        assert self.chosen is not None, "a run has a configuration"
        self.open(self.chosen, step)

    def open(self, config: RunConfig, step: int = 0) -> None:
        """Makes the folder and writes the configuration that repeats the run.

        Args:
            step: steps that have been done; what the folder says of later ones is forgotten.
        """
        metrics = self.path / "metrics.jsonl"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not self._is_claimed:
                self.claim()
                if (self.path / self.SETTINGS).exists():
                    self._refuse("another run has begun there meanwhile")
            known = _lines_before(metrics, step) if step else ""
            _write_whole(metrics, known)
            self._metrics = Journal(metrics)
            _write_whole(self.path / self.SETTINGS, config.to_toml())
        except OSError as error:
            self._refuse(error.strerror)

    def claim(self) -> None:
        """Keeps the folder, if it is there, for this process; nobody is kept out where a file system cannot.

        Raises:
            ConfigError: another run is writing there.
        """
        if not self.path.is_dir():
            return
        self._is_claimed = True
        try:
            handle = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            self._refuse(error.strerror)
        weakref.finalize(self, os.close, handle)  # which gives it free
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._refuse("another run is writing there")
        except OSError:
            pass

    def on_step(self, record: StepRecord) -> None:
        """Writes a line for a step."""
        self._write(
            event="train",
            step=record.step,
            epoch=record.epoch,
            kind=record.kind,
            samples=record.samples,
            loss=record.losses,
            cosine=record.cosines,
            samples_per_second=record.samples_per_second,
            waited_fraction=record.waited_fraction,
            memory_bytes=record.memory_bytes,
            **({"skipped": record.skipped} if record.skipped else {}),
        )

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """Writes a line for an evaluation."""
        self._write(
            event="eval",
            step=record.step,
            epoch=record.epoch,
            loss=record.losses,
            accuracy=record.accuracies,
            **({"metrics": record.metrics} if record.metrics else {}),
        )

    def finish(
        self, config: RunConfig, summary: Summary, about: Mapping[str, Any]
    ) -> None:
        """Writes the summary; the run is complete.

        Args:
            about: what it says of the data.

        Raises:
            DataError: the disk is full.
        """
        fields = {
            "config": config.options(),
            "versions": versions(),
            **about,
            **dataclasses.asdict(summary),
        }
        text = json.dumps(_finite(fields), indent=2)
        assert self._metrics is not None, "open comes first"
        try:
            self._metrics.close()
            # Whole or not at all, for whoever watches the folder.
            _write_whole(self.path / self.SUMMARY, text + "\n")
        except OSError as error:
            raise DataError(
                f"expected room for the end of the run in {self.path}, got: {error.strerror}; make room, and "
                "the same command goes on from the last checkpoint"
            ) from None

    def _write(self, **fields: Any) -> None:
        assert self._metrics is not None, "open comes first"
        self._metrics.add(json.dumps(_finite(fields)))


def _write_whole(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(path)


def _lines_before(path: Path, step: int) -> str:
    """The lines of steps and evaluations that a checkpoint after so many steps knows of."""
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    return "".join(f"{line}\n" for line in text.split("\n") if _step_of(line) < step)


def _step_of(line: str) -> float:
    """Which step a line is about; infinity for one that was cut off, or spoilt by a power cut."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf


def about_data(run_dir: Path) -> dict[str, Any]:
    """What a finished run says of its data, such as its classes; nothing, if it is of an earlier version.

    Raises:
        ConfigError: no run has come to its end there.
    """
    try:
        summary = json.loads((run_dir / RunDirectory.SUMMARY).read_bytes())
    except (OSError, ValueError):
        raise ConfigError(
            f"expected a finished run in {run_dir}, found no {RunDirectory.SUMMARY} there that can be "
            "read; pass the --run-dir of a run that has ended"
        ) from None
    return {key: summary[key] for key in _ABOUT if key in summary}


def default_path() -> Path:
    """A folder named by the date and time."""
    return Path("runs") / time.strftime("%Y%m%d-%H%M%S")


def versions() -> dict[str, str]:
    """What the run's numbers depend on."""
    return {
        "pglpipe": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "numpy")},
    }


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity: null stands for both."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
