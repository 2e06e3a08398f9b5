"""Where a run begins: anew, from its own last checkpoint, or from another run's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pglpipe.app.config import RunConfig, option_fields
from pglpipe.app.config_file import resolve
from pglpipe.app.run_directory import RunDirectory
from pglpipe.checkpoint import disk as checkpoint
from pglpipe.checkpoint.writer import Checkpoints, chosen
from pglpipe.errors import ConfigError

# What may differ between two parts of a run: how it is shown, kept and carried, and its cut.
FREE = (
    *("run_dir", "quiet", "data_root", "download", "sanity_check"),
    *("checkpoint_every", "checkpoint_minutes", "keep_checkpoints"),
    *("transport", "queue_depth", "edge_timeout", "evaluate_every"),
)
CUT = ("stages", "balance")
# What a run chooses by itself where it is left open, and then keeps.
CHOSEN = {
    "balance": ("flops", "time", "memory", "params", "published"),
    "device": ("auto",),
    "threads": (0,),
    "compare_every": (None,),
}
FITTED = ("recompute", "microbatches", "local_microbatches")  # to a memory budget


@dataclass(frozen=True)
class Start:
    """How a run begins.

    Attributes:
        config: the options of the run.
        folder: its run directory.
        checkpoint: the folder of the one that it goes on from; None if it begins anew.
        step: steps that have been done there, if they are this run's own.
        is_new: whether nothing has been chosen for it before, see :data:`FITTED`.
    """

    config: RunConfig
    folder: Path
    checkpoint: Path | None = None
    step: int = 0
    is_new: bool = True

    def to_json(self) -> list[Any]:
        """For the other workers."""
        return [self.config.options(), str(self.folder), self.step, self.is_new]

    @staticmethod
    def from_json(told: list[Any]) -> Start:
        """What :meth:`to_json` said; which checkpoint it is, worker 0 says later."""
        config, folder, step, is_new = told
        return Start(RunConfig.of(**config), Path(folder), None, step, is_new)


def start(asked: RunConfig, folder: Path, *, restarted: bool = False) -> Start:
    """How the run that is asked for begins in this folder.

    Args:
        restarted: whether a launcher has started the same command before, so that the run is its own.

    Raises:
        ConfigError: the folder holds another run, or one that has ended.
    """
    settings = folder / RunDirectory.SETTINGS
    if not settings.exists():
        if asked.output.resume in ("auto", "never"):
            return Start(asked, folder)
        return Start(asked, folder, chosen(None, asked.output.resume))
    if (folder / RunDirectory.SUMMARY).exists():
        raise ConfigError(
            f"expected a new run directory, but {folder} already holds a run that has come to its end; "
            "choose another --run-dir"
        )
    known = resolve(settings, {})
    is_own = asked.output.resume == known.output.resume and (
        restarted or asked.output.resume != "never"
    )
    if asked.output.resume != "auto" and not is_own:
        raise ConfigError(
            f"expected a new run directory for --resume {asked.output.resume}, but {folder} already holds a "
            "run; choose another --run-dir, or --resume auto to go on with that run"
        )
    if different := _differences(asked, known):
        raise ConfigError(
            f"expected the options that the run in {folder} began with, got {'; '.join(different)}; repeat "
            "them, or begin a new run with another --run-dir and --resume of a checkpoint"
        )
    config = _merged(asked, known)
    found = chosen(Checkpoints(folder / RunDirectory.CHECKPOINTS), "auto")
    if found is not None:
        step = checkpoint.read_manifest(found)["position"]["step"]
        return Start(config, folder, found, step, is_new=False)
    if config.output.resume not in (
        "auto",
        "never",
    ):  # it has not come to a checkpoint of its own
        found = chosen(None, config.output.resume)
    return Start(config, folder, found, is_new=False)


def _differences(asked: RunConfig, known: RunConfig) -> list[str]:
    found, values, before = list[str](), asked.options(), known.options()
    for _, name, _ in option_fields():
        now, was = values.get(name), before.get(name)
        left_open = now in CHOSEN.get(name, ()) or (
            name in FITTED and asked.memory.budget is not None
        )
        if now != was and name not in (*FREE, *CUT, "resume") and not left_open:
            found.append(f"--{name.replace('_', '-')} {now} (it was {was})")
    return found


def _merged(asked: RunConfig, known: RunConfig) -> RunConfig:
    """What was chosen when the run began, and what is asked for now where that may differ."""
    values = asked.options()
    cut, before = asked.cut, known.cut
    recut = cut.stages != before.stages or (
        cut.balance not in CHOSEN["balance"] and cut.balance != before.balance
    )
    names = (*FREE, *CUT) if recut else FREE
    return known.replaced(**{name: values[name] for name in names})
