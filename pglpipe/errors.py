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
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class PglpipeError(Exception):
    """The root of everything that pglpipe raises on purpose.

    Attributes:
        already_reported: whether some worker has already shown the message to the user.
    """

    already_reported = False

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
        order: orders what several workers find of one cause: the step, and the stages in the order
            in which such a number travels.
    """

    def __init__(self, message: str, order: tuple[int, int]) -> None:
        super().__init__(message)
        self.order = order


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


# How many blocks are open in which settings are named as options of the command line.
_blocks = 0
_counting = threading.Lock()

# Of the settings that are fields of a section: the section, and the field. Sections enter themselves.
IN_PYTHON: dict[str, tuple[str, str]] = {}
# Options of the command line that have another form in Python: alone, and with a value.
_OTHERWISE = {
    "data_root": ("root", "root={}"),
    "model": ("Cut(model=)", "Cut(model={})"),
    "drop_last": ("DataLoader(drop_last=True)", "DataLoader(drop_last={})"),
    "batch_size": ("the loader's batch size", "a batch size of {} in the loader"),
    "lr": ("the optimizer's lr", "an lr of {} in the optimizer"),
}
# Arguments in Python that are no option of the command line.
ONLY_IN_PYTHON = frozenset(
    (
        *("cut", "loss", "learning_rate", "guidance", "gradients"),
        *("memory", "machine", "edges", "observer", "world", "checkpoints", "folder"),
        "path",
    )
)


@contextmanager
def command_line_style() -> Iterator[None]:
    """Has messages name settings as options of the command line, in all threads of the process."""
    global _blocks
    with _counting:
        _blocks += 1
    try:
        yield
    finally:
        with _counting:
            _blocks -= 1


def setting(name: str, value: object = None) -> str:
    """A setting, and its value if there is one, in the words of whoever set it.

    To be called when a message is made, not before: a module does not know yet who will read it.

    Args:
        name: the option's name with underscores, such as ``"guidance_period"``.
        value: what it is set to.

    >>> setting("loss"), setting("steps", 2)
    ('loss', 'steps=2')
    >>> with command_line_style():
    ...     setting("queue_depth", 2), setting("guidance_period"), setting("compile", True)
    ('--queue-depth 2', '--guidance-period', '--compile')
    >>> with command_line_style():
    ...     setting("balance", [2, 3]), setting("compile", False)
    ('--balance 2,3', '--no-compile')
    """
    if _blocks and name not in ONLY_IN_PYTHON:
        return _as_option(name.replace("_", "-"), value)
    if name in IN_PYTHON:
        section, field = IN_PYTHON[name]
        return f"{section}({field}={'' if value is None else repr(value)})"
    alone, with_value = _OTHERWISE.get(name, (name, f"{name}={{}}"))
    return alone if value is None else with_value.format(repr(value))


def _as_option(name: str, value: object) -> str:
    if value is None or value is True:
        return f"--{name}"
    if value is False:
        return f"--no-{name}"
    if isinstance(value, (list, tuple)):
        return f"--{name} {','.join(map(str, value))}"
    return f"--{name} {value}"


def shown(value: Any) -> str:
    """A value in a message, however long it is."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write numbers of thousands of digits
        text = "a number too long to be shown"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


_MOST_SHOWN = 200  # characters


def nearest(word: str, valid: Iterable[str]) -> str:
    """The hint that ends a message about an unknown word.

    >>> nearest("resnet23", ["resnet32", "vgg11"])
    "did you mean 'resnet32'? valid: resnet32, vgg11"
    """
    valid = sorted(valid)
    close = difflib.get_close_matches(word, valid, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid: {', '.join(valid)}"
