"""What can go wrong, and whose turn it is to act.

::

    PglpipeError
    ├── UserError               the user can repair it: one line, exit status 2
    │   ├── ConfigError         an option, a key of the config file, a combination
    │   ├── PartitionError      the network cannot be cut as asked
    │   └── DataError           a data set is missing, empty or broken
    ├── Stopped                 a run was asked to end, and can go on
    └── WorkerError             the run is over on every worker, exit status 1
        ├── PeerLost            a neighbour's process is gone
        │   └── PeerLeft        it has ended in peace, while this one needs it
        ├── EdgeTimeout         a neighbour is silent for too long
        ├── ProtocolError       a neighbour sent what nobody expects here
        └── NonFinite           a loss or a gradient is no finite number

    PglpipeWarning              the run goes on, but not as it was meant to

A message says what was expected, what came, and how to repair it, on one line.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class PglpipeError(Exception):
    """The root of everything that pglpipe raises on purpose.

    Attributes:
        told: whether some worker has already shown the message to the user.
    """

    told = False

    def __init__(self, text: str = "") -> None:
        super().__init__(_on_one_line(text))


class UserError(PglpipeError, ValueError):
    """A mistake in what was asked for; the message says how to repair it."""


class ConfigError(UserError):
    """An option, a key of the config file, or a combination of them."""


class PartitionError(UserError):
    """The network cannot be cut as asked."""


class DataError(UserError):
    """A data set is missing, empty or broken."""


class WorkerError(PglpipeError, RuntimeError):
    """The run cannot go on; every worker ends.

    Attributes:
        rank: the worker whose fault it seems to be, where that is known.
    """

    def __init__(self, text: str = "", *, rank: int | None = None) -> None:
        super().__init__(text)
        self.rank = rank


class PeerLost(WorkerError):
    """A neighbour's process is gone."""


class PeerLeft(PeerLost):
    """A worker has ended its part in peace, while another still needs it."""


class EdgeTimeout(WorkerError):
    """A neighbour has been silent for longer than the edge's time-out."""


class ProtocolError(WorkerError):
    """A message arrived that does not belong here."""


class Stopped(PglpipeError):
    """A run was asked to end before it was done, and did.

    Args:
        newest: its last checkpoint, if any could be made.
        folder: of the run.

    Attributes:
        signal: the number of the signal that asked.
    """

    def __init__(self, newest: object | None, folder: object, signal: int) -> None:
        super().__init__(
            f"stopped; the last checkpoint is {newest}, and the same command goes on from there if it "
            f"says --run-dir {folder}"
            if newest
            else f"stopped; there is no checkpoint in {folder}, and the same command begins anew"
        )
        self.signal = signal


class NonFinite(WorkerError):
    """A loss or a gradient is no finite number.

    Attributes:
        place: orders what several workers find of one cause: the step, and the stages in the order
            in which such a number travels.
    """

    def __init__(self, message: str, place: tuple[int, int]) -> None:
        super().__init__(message)
        self.place = place


class PglpipeWarning(UserWarning):
    """Something is not as it was meant to be, and the run goes on."""


def warn(text: str) -> None:
    """Warns of something in one line, where the caller was called."""
    warnings.warn(_on_one_line(text), PglpipeWarning, stacklevel=3)


def _on_one_line(text: str) -> str:
    """The text with whatever cannot be printed escaped: a file's name may hold anything.

    >>> _on_one_line("no\\nimage")
    'no\\\\nimage'
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# How settings are written in messages: as arguments of Python calls, or as command-line options.
_style = "python"

# Settings whose name in Python is not their name on the command line.
_IN_PYTHON = {
    "stages": "num_stages",
    "checkpoint_every": "Checkpoints(every=)",
    "checkpoint_minutes": "Checkpoints(minutes=)",
    "keep_checkpoints": "Checkpoints(keep=)",
    "drop_last": "DataLoader(drop_last=True)",
    "batch_size": "the loader's batch size",
    "lr": "the optimizer's lr",
}
# Settings that are fields of an object in Python, by the beginning of their name.
_OBJECTS = {
    "guidance": "Guidance",
    "guided": "Guided",
    "local_weight": "LocalWeight",
}


@contextmanager
def command_line_style() -> Iterator[None]:
    """Has messages name settings as options of the command line."""
    global _style
    before, _style = _style, "command line"
    try:
        yield
    finally:
        _style = before


def setting(name: str, value: object = None) -> str:
    """A setting, and its value if there is one, in the words of whoever set it.

    Args:
        name: the option's name with underscores, such as ``"guidance_period"``.
        value: what it is set to.

    >>> setting("queue_depth"), setting("queue_depth", 2), setting("guidance_period", 3)
    ('queue_depth', 'queue_depth=2', 'Guidance(period=3)')
    >>> with command_line_style():
    ...     setting("queue_depth", 2), setting("guidance_period"), setting("compile")
    ('--queue-depth 2', '--guidance-period', '--compile')
    """
    if _style == "command line":
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            return flag if value else f"--no-{name.replace('_', '-')}"
        return flag if value is None else f"{flag} {value}"
    if known := _IN_PYTHON.get(name):
        if "=)" in known and value is not None:
            return known.replace("=)", f"={value!r})")
        return known if value is None or "'" in known else f"{known}={value!r}"
    for prefix, owner in _OBJECTS.items():
        if name.startswith(f"{prefix}_"):
            field = name.removeprefix(f"{prefix}_")
            return f"{owner}({field}={'' if value is None else repr(value)})"
    return name if value is None else f"{name}={value!r}"


def nearest(word: str, valid: Iterable[str]) -> str:
    """The hint that ends a message about an unknown word.

    >>> nearest("resnet23", ["resnet32", "vgg11"])
    "did you mean 'resnet32'? valid: resnet32, vgg11"
    """
    valid = sorted(valid)
    close = difflib.get_close_matches(word, valid, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid: {', '.join(valid)}"
