"""The command line: parse, call, print.

Every setting of a section (:mod:`pglpipe.app.config`) is an option of the same name; only what
was really given is passed on, so that it can beat the file and the file the defaults.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from pglpipe.app import run
from pglpipe.app.config import RunConfig, option_fields
from pglpipe.app.config_file import resolve
from pglpipe.app.doctor.examine import examine
from pglpipe.app.doctor.show import show_diagnosis
from pglpipe.app.generate import SAMPLE
from pglpipe.app.quantities import flops_of, link_of
from pglpipe.app.streams import lasting
from pglpipe.errors import (
    ConfigError,
    PglpipeWarning,
    Stopped,
    UserError,
    WorkerError,
    command_line_style,
)
from pglpipe.observe import tables
from pglpipe.plan.memory import as_bytes
from pglpipe.plan.spec import Cut
from pglpipe.utils.options import Section

# Some versions of typer build on click, others on a copy of their own; in both of them the
# errors that a command line can have are siblings of this one.
UsageError: Any = typer.BadParameter.__mro__[1]

Config = Annotated[
    Optional[Path], typer.Option("--config", help="TOML file of options")
]
# How long a worker stays whose message another worker prints, because a launcher ends all workers
# with the first one. torchrun ends it as soon as the other has left; other launchers may not.
_GRACE_SECONDS = 1.0
_TORCHRUN_SECONDS = 30.0
_usual_warning = warnings.formatwarning

RunDir = Annotated[Path, typer.Option("--run-dir", help="folder of a finished run")]


def _with_options(
    *hidden: str,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds an option for every setting; unset ones arrive as None.

    Those that most people need come first, the others in a panel for each section.

    Args:
        hidden: sections whose settings a command takes without showing them in its help.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        found = sorted(option_fields(), key=lambda each: not each[2].metadata["common"])
        options = [_parameter(*each, each[0].__name__ in hidden) for each in found]

        @wraps(command)
        def call(**given: Any) -> None:
            command(**given)

        call.__signature__ = signature.replace(parameters=own + options)  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in own + options}
        return call

    return decorate


def _parameter(
    section: type[Section], name: str, field: dataclasses.Field[Any], hidden: bool
) -> inspect.Parameter:
    about = field.metadata
    help, kind = about["help"], about["kind"]
    if about["choices"]:
        help += f": {', '.join(about['choices'])}"
    if field.default is True:
        help += "; on by default"
    elif field.default:
        help += f"; default {field.default}"
    option = typer.Option(
        f"--{name.replace('_', '-')}"
        + (f"/--no-{name.replace('_', '-')}" if kind is bool else ""),
        help=help,
        show_default=False,
        hidden=hidden,
        rich_help_panel="Most used" if about["common"] else section.title,
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[Optional[kind], option],
    )


def train(config: Config = None, **options: Any) -> None:
    """Trains; under torchrun with one worker per process."""
    run.train(_resolve(config, options))


def plan(
    config: Config = None,
    devices: Annotated[int, typer.Option(help="devices, with a worker on each")] = 1,
    link: Annotated[
        str,
        typer.Option(
            help="rate and delay between devices, such as 100Mbit,5ms: compares ways to train"
        ),
    ] = "",
    memory: Annotated[
        str, typer.Option(help="of a device, such as 8GiB; without it any will do")
    ] = "",
    device_flops: Annotated[
        str,
        typer.Option(
            help="operations per second of a device, such as 10T; without it stages are timed here"
        ),
    ] = "",
    json: Annotated[
        bool, typer.Option("--json", help="print the comparison as JSON")
    ] = False,
    **options: Any,
) -> None:
    """Shows where the network is cut and what each stage holds, and compares ways to train; trains nothing."""
    if (memory or device_flops or json) and not link:
        raise ConfigError(
            "expected --link, such as 100Mbit,5ms, for a comparison of ways to train, got none; give it, or drop "
            "the other options of the comparison"
        )
    if config is None and options["stages"] is None:
        options["stages"] = max(devices, Cut.stages)
    found, comparison = run.plan(
        _resolve(config, options),
        devices,
        link_of(link) if link else None,
        memory=as_bytes(memory, "--memory") if memory else None,
        flops=flops_of(device_flops) if device_flops else None,
    )
    if json:
        tables.show_json(comparison)
        return
    tables.show_plan(found)
    if comparison:
        tables.show_comparison(comparison)


def evaluate(
    run_dir: RunDir,
    data_root: Annotated[
        str,
        typer.Option(help="where the data are now; else where the run found them"),
    ] = "",
) -> None:
    """Evaluates every exit of a finished run on its test images."""
    tables.show_exits(*run.evaluate(run_dir, data_root))


def generate(
    run_dir: RunDir,
    prompt: Annotated[str, typer.Option(help="text to go on from")] = "\n",
    tokens: Annotated[int, typer.Option(min=1, help="how many to write")] = SAMPLE,
    temperature: Annotated[
        float, typer.Option(min=0, help="of the choice; 0 takes the likeliest token")
    ] = 1.0,
) -> None:
    """Lets the language model of a finished run write text."""
    print(run.generate(run_dir, prompt, tokens, temperature))


def export(
    run_dir: RunDir,
    output: Annotated[
        Path,
        typer.Option(
            help="file to write, .pt or .safetensors; of a model hf:…, a folder where there is no suffix"
        ),
    ] = Path("model.pt"),
) -> None:
    """Writes the uncut network of a finished run as an ordinary state_dict."""
    run.export(run_dir, output)
    print(f"written to {output}")


def doctor() -> None:
    """Checks machines and network, under torchrun every edge too; says what to set."""
    diagnosis = examine()
    if _leads():
        show_diagnosis(diagnosis)
    elif diagnosis.status:
        _let_another_tell(has_told=False)
    _leave(diagnosis.status)


def commands() -> typer.Typer:
    """The commands, with an option for every setting that there is now."""
    app = typer.Typer(
        help="Train a network as a pipeline of locally supervised stages with periodic global guidance.",
        no_args_is_help=True,
        add_completion=False,
    )
    app.command()(_with_options()(train))
    hidden = "Optimizer", "Length", "Checkpoints", "Output"
    app.command()(_with_options(*hidden)(plan))
    for command in (evaluate, generate, export, doctor):
        app.command()(command)
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; a mistake is one line and status 2, a lost worker status 1."""
    # As `python -m` does, so that the console script finds a user's own model, too.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, "")
    warnings.formatwarning = _format_warning
    with lasting():
        _main(arguments)


def _main(arguments: Sequence[str] | None) -> None:
    try:
        # Some versions of typer return the status of an interruption, others raise it.
        with command_line_style():
            if status := commands()(arguments, standalone_mode=False):
                _leave(status)
    except UsageError as error:
        text = " ".join(error.format_message().split())
        if "--local-rank" in text or "--local_rank" in text:
            text = (
                "expected torchrun, got python -m torch.distributed.launch, which passes --local-rank; start "
                "workers with torchrun --nproc_per_node=N -m pglpipe.train"
            )
        _fail(text, 2, already_reported=not _leads())
    except UserError as error:
        _fail(str(error), 2, already_reported=error.already_reported)
    except WorkerError as error:
        _show_cause(error)
        _fail(str(error), 1, already_reported=error.already_reported)
    except Stopped as stopped:
        if _leads():
            print(f"pglpipe: {stopped}", file=sys.stderr, flush=True)
        _leave(128 + stopped.signal)
    except (KeyboardInterrupt, typer.Abort) as error:
        if isinstance(error.__cause__, EOFError):  # of a file, for nobody is asked here
            raise error.__cause__ from None
        _leave(130)


def train_main() -> None:
    """``python -m pglpipe.train``: the command ``train``."""
    main(["train", *sys.argv[1:]])


def _resolve(file: Path | None, options: dict[str, Any]) -> RunConfig:
    """The configuration; a mistake in it is every worker's, and worker 0's to tell."""
    given = {name: value for name, value in options.items() if value is not None}
    try:
        return resolve(file, given)
    except UserError as error:
        error.already_reported = not _leads()
        raise


def _format_warning(
    message: Warning | str, category: type[Warning], *where: Any, **more: Any
) -> str:
    """A warning as it is printed: ours without the line of code that it comes from."""
    if issubclass(category, PglpipeWarning):
        return f"pglpipe: warning: {message}\n"
    return _usual_warning(message, category, *where, **more)


def _show_cause(error: WorkerError) -> None:
    """Where in the user's own code a worker failed, on that worker."""
    if error.__cause__ is not None and not isinstance(error.__cause__, WorkerError):
        traceback.print_exception(error.__cause__)


def _fail(text: str, status: int, *, already_reported: bool) -> None:
    """Ends this worker with a message, or without one where another worker has told it."""
    if already_reported:  # of a lost worker it has been, of a mistake perhaps not yet
        _let_another_tell(has_told=status == 1)
    elif text:  # without any argument the help says it all
        print(f"pglpipe: error: {text}", file=sys.stderr, flush=True)
    _leave(status)


def _let_another_tell(*, has_told: bool) -> None:
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    time.sleep(_TORCHRUN_SECONDS if under_torchrun and not has_told else _GRACE_SECONDS)


def _leads() -> bool:
    # Where half of what a launcher sets is missing, nobody else is there to tell.
    return os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ


def _leave(status: int) -> None:
    sys.stdout.flush()
    # Not sys.exit: threads that wait for a lost neighbour would hold the process.
    os._exit(status)
