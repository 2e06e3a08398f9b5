"""What a run leaves on disk.

::

    RUN_DIR/
      config.toml         everything resolved: the same run again is --config of this file
      metrics.jsonl       one line per step and evaluation, as they complete
      model.safetensors   the weights at the end, of the network and of the heads
      summary.json        how it went; its presence says that the run is complete
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

from pglpipe.__version__ import __version__
from pglpipe.config import RunConfig
from pglpipe.errors import ConfigError
from pglpipe.metrics import EvaluationRecord, StepRecord, Summary


class RunDirectory:
    """An observer that writes what it sees.

    Args:
        path: the folder; made if missing, refused if it already holds a run.

    Raises:
        ConfigError: the folder cannot be written, or holds a run.
    """

    WEIGHTS = "model.safetensors"

    def __init__(self, path: Path) -> None:
        self.path = path
        if (path / "config.toml").exists():
            raise ConfigError(
                f"expected a new run directory, but {path} already holds a run; "
                "choose another --run-dir"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            # Line by line on disk, so that a killed run keeps what it saw.
            self._metrics = open(
                path / "metrics.jsonl", "w", buffering=1, encoding="utf-8"
            )
        except OSError as error:
            raise ConfigError(
                f"expected a run directory that can be written, but {path}: {error.strerror}; "
                "choose another --run-dir"
            ) from None

    @property
    def weights(self) -> Path:
        """Where the weights at the end go."""
        return self.path / self.WEIGHTS

    def write_config(self, config: RunConfig) -> None:
        """Writes the configuration that repeats the run."""
        (self.path / "config.toml").write_text(config.to_toml(), encoding="utf-8")

    def on_step(self, record: StepRecord) -> None:
        """Writes a line for a step."""
        self._write(
            event="train",
            step=record.step,
            epoch=record.epoch,
            kind=record.kind,
            samples=record.samples,
            loss=record.losses,
            samples_per_second=record.samples_per_second,
            waited_fraction=record.waited_fraction,
            memory_bytes=record.memory_bytes,
        )

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """Writes a line for an evaluation."""
        self._write(
            event="eval",
            step=record.step,
            epoch=record.epoch,
            loss=record.losses,
            accuracy=record.accuracies,
        )

    def finish(self, config: RunConfig, summary: Summary) -> None:
        """Writes the summary; the run is complete."""
        self._metrics.close()
        text = json.dumps(
            {
                "config": dataclasses.asdict(config),
                "versions": versions(),
                **dataclasses.asdict(summary),
            },
            indent=2,
        )
        (self.path / "summary.json").write_text(text + "\n", encoding="utf-8")

    def _write(self, **fields: Any) -> None:
        self._metrics.write(
            json.dumps({k: _finite(v) for k, v in fields.items()}) + "\n"
        )


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
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
