"""The composition root: from a configuration to a finished run.

The only file that knows every part. All workers run it alike; worker 0 alone loads the
data, writes the run directory and shows anything.
"""

from __future__ import annotations

import math
import os
import secrets
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from pglpipe import models
from pglpipe.app.build import learning_rate, local_loss, optimizer, task
from pglpipe.app.config import RunConfig
from pglpipe.app.config_file import resolve
from pglpipe.app.generate import SAMPLE, Codec, continued
from pglpipe.app.resume import Start
from pglpipe.app.resume import start as start_of
from pglpipe.app.run_data import Facts, Material, TextFacts, load
from pglpipe.app.run_directory import RunDirectory, about_data, default_path, versions
from pglpipe.app.signals import not_yet_saving, stopping
from pglpipe.checkpoint import disk as checkpoint
from pglpipe.checkpoint import weights as state
from pglpipe.checkpoint.weights import Tensors
from pglpipe.checkpoint.writer import Checkpoints
from pglpipe.cluster.failure import fail
from pglpipe.cluster.world import World, join
from pglpipe.errors import ConfigError, Stopped, UserError, WorkerError, setting, warn
from pglpipe.models.huggingface import hugging_face_network, save_folder
from pglpipe.models.layer import Layer
from pglpipe.models.split import body_of
from pglpipe.observe import tables
from pglpipe.observe import terminal as display
from pglpipe.observe.observers import Observer, Observers
from pglpipe.observe.records import Summary
from pglpipe.plan.checks import check_workers
from pglpipe.plan.compare import Comparison, compare
from pglpipe.plan.memory import as_text
from pglpipe.plan.placement import Plan
from pglpipe.plan.predict import Predictor
from pglpipe.plan.simulate import Link
from pglpipe.trainer import Trainer
from pglpipe.utils import device as devices
from pglpipe.utils.seeding import Draws

_LINGER_SECONDS = 2.0


def train(config: RunConfig) -> Summary:
    """Trains as configured, with as many workers as were started.

    Returns:
        How it went, the same on every worker.

    Raises:
        UserError: something in the configuration cannot be done.
        WorkerError: a worker failed; the message names it.
    """
    with not_yet_saving() as early:
        world = join(config.edges.timeout)
        try:
            with _failing_together(world):
                return _train(config, world, early)
        finally:
            world.leave()


def plan(
    config: RunConfig,
    devices: int,
    link: Link | None = None,
    *,
    memory: int | None = None,
    flops: float | None = None,
) -> tuple[Plan, Comparison | None]:
    """Where the network is cut, and what each stage will hold and cost. Trains nothing.

    Args:
        devices: with a worker on each.
        link: between neighbours, for a comparison of the ways to train on them; None for none.
        memory: bytes that a device has; None for any number.
        flops: operations per second of a device; None to measure the stages on this one.
    """
    trainer, found = _planned(config, devices)
    if link is None:
        return found, None
    return found, compare(trainer.predictor(link, device_flops=flops), memory)


def predictor(
    config: RunConfig, devices: int, link: Link, *, cores: float = math.inf
) -> Predictor:
    """Predicts the steps of a run; see :meth:`pglpipe.trainer.Trainer.predictor`."""
    trainer, _ = _planned(config, devices)
    return trainer.predictor(link, cores=cores)


def _planned(config: RunConfig, devices: int) -> tuple[Trainer, Plan]:
    """A trainer that knows who holds what, with a worker on each device."""
    check_workers(config.cut.stages, devices)
    config.machine.set_threads()
    world = World(size=devices)
    material = load(config, world)
    trainer = _trainer(config, material, world)
    return trainer, trainer.prepare(material.train)


def evaluate(run_dir: Path, data_root: str = "") -> tuple[Plan, Summary]:
    """The exits of a finished run on its test images.

    Args:
        data_root: where the data are now; empty for where they were.
    """
    about = about_data(run_dir)
    config = resolve(run_dir / RunDirectory.SETTINGS, {})
    if data_root:
        config = config.replaced(data_root=data_root)
    config.machine.set_threads()
    world = World()
    material = load(config, world, about)
    weights = run_dir / RunDirectory.WEIGHTS
    trainer = _trainer(config, material, world, weights=weights)
    summary = trainer.evaluate(material.test)
    trainer.close()
    return trainer.plan, summary


def export(run_dir: Path, output: Path) -> None:
    """Writes the uncut network of a finished run as an ordinary ``state_dict``.

    A network of transformers becomes a folder that transformers reads, where ``output`` has no suffix.
    """
    about = about_data(run_dir)
    weights = state.without_heads(state.load(run_dir / RunDirectory.WEIGHTS))
    network = resolve(run_dir / RunDirectory.SETTINGS, {}).network
    source = network.model.removeprefix("hf:")
    if source == network.model or output.suffix:
        state.export(output, weights, about)
        return
    names = dict(enumerate(about.get("classes", ())))
    options = {"id2label": names, "label2id": {n: i for i, n in names.items()}}
    module = hugging_face_network(
        source, untie=network.untie, **(options if names else {})
    )
    save_folder(module, output, weights)


def generate(run_dir: Path, prompt: str, count: int, temperature: float) -> str:
    """A text, and what the language model of a finished run lets follow it.

    Raises:
        ConfigError: the run has trained no language model.
    """
    about = about_data(run_dir)
    config = resolve(run_dir / RunDirectory.SETTINGS, {})
    if "context" not in about:
        raise ConfigError(
            f"expected a run of {setting('task', 'lm')} in {run_dir}, got {setting('task', config.data.task)}; pass the "
            "--run-dir of a language model"
        )
    codec, expected = Codec(config.data.tokenizer), about["vocabulary"]
    if codec.vocabulary != expected:
        raise ConfigError(
            f"expected the tokenizer that the run was trained with, of {expected} tokens, got {codec.vocabulary} from "
            f"{config.data.tokenizer or 'bytes'}; put the former back"
        )
    weights = state.load(run_dir / RunDirectory.WEIGHTS)
    config.machine.set_threads()
    body = state.without_heads(weights)
    return _continued(
        config, TextFacts(**about), body, codec, prompt, count, temperature
    )


def _sample(config: RunConfig, facts: TextFacts, weights: Tensors) -> str:
    """What a language model writes of itself."""
    codec = Codec(config.data.tokenizer)
    return _continued(config, facts, weights, codec, "\n", SAMPLE, 1.0)


def _continued(
    config: RunConfig,
    facts: TextFacts,
    weights: Tensors,
    codec: Codec,
    prompt: str,
    count: int,
    temperature: float,
) -> str:
    network = body_of(_layers(config, facts), lambda layer: layer.build())
    network.load_state_dict(weights)
    return continued(
        network,
        codec,
        prompt,
        count,
        context=config.data.context,
        temperature=temperature,
        seed=config.machine.seed,
    )


def _train(asked: RunConfig, world: World, early: list[int]) -> Summary:
    leads = world.place.is_leader
    # Before the data is read: a folder that cannot be written should not cost minutes.
    start, folder = _start(asked, world)
    config = start.config
    world.recent.keep_in(start.folder)
    world.recent.begin("loading the data")
    config.machine.set_threads()
    material = load(config, world)
    observers = Observers()
    trainer = _trainer(config, material, world, observer=observers, fits=start.is_new)
    plan = trainer.prepare(material.train, material.test)
    # What was chosen here, so that config.toml repeats the run to the bit.
    root, tokenizer = config.data.data_root, config.data.tokenizer
    memory = plan.memory
    config = config.replaced(
        # Evaluation may be asked for from another directory.
        data_root=root and os.path.abspath(os.path.expanduser(root)),
        tokenizer=tokenizer and os.path.abspath(os.path.expanduser(tokenizer)),
        balance=",".join(map(str, plan.balance)),
        threads=torch.get_num_threads(),
        device=devices.pick(config.machine.device, world.local_rank).type,
        compare_every=trainer.compare_every,
        recompute=memory.recompute,
        microbatches=memory.microbatches,
        local_microbatches=memory.local_microbatches,
    )
    if leads and not start.is_new:
        _warn_beyond(config.memory.budget, plan)
    total_steps = config.length.steps or config.length.epochs * material.steps_per_epoch
    screen = display.screen(
        plan,
        total_steps,
        quiet=config.output.quiet or not leads,
        tokens=material.facts.tokens,
    )
    observers.members.append(screen)
    if folder:
        folder.chosen = config
        observers.members.insert(0, folder)
    # To the end: who asks to stop when all steps are done has the weights written all the same.
    with stopping(trainer.stop, trainer.checkpoint) as caught:
        if early:
            trainer.checkpoint()
        with screen:
            summary = trainer.fit(
                material.train,
                epochs=config.length.epochs or None,
                steps=config.length.steps or None,
                evaluate=material.test,
                evaluate_every=config.length.evaluate_every,
                checkpoints=_checkpoints(start.folder, config),
                resume=start.checkpoint,
            )
        if trainer.ended_early:
            trainer.close()
            newest, _ = checkpoint.newest(start.folder / RunDirectory.CHECKPOINTS)
            raise Stopped(newest, start.folder, caught[0] if caught else signal.SIGTERM)
        body, heads = trainer.weights()
        trainer.close()
        if folder:
            about = material.facts.about()
            state.save(folder.weights, body, heads, about)
            folder.finish(config, summary, about)
    if folder:
        tables.show_exits(plan, summary, folder.path, tokens=material.facts.tokens)
        if isinstance(material.facts, TextFacts) and not config.output.quiet:
            tables.show_text(_sample(config, material.facts, body))
    return summary


def _warn_beyond(budget: int | None, plan: Plan) -> None:
    """What was fitted to a budget when the run began need not fit on other workers."""
    if budget is None:
        return
    peaks = [max((kept or {}).values(), default=0) for kept in plan.predicted]
    for rank, peak in enumerate(peaks):
        if peak > budget:
            warn(
                f"{plan.name(rank)} will keep {as_text(peak)} for backward, more than --memory-budget: the "
                "settings that change numbers stay as they were when the run began; use more workers"
            )


def _start(asked: RunConfig, world: World) -> tuple[Start, RunDirectory | None]:
    """How the run begins, as worker 0 finds it, and its folder there."""
    if not world.place.is_leader:
        # All files of a checkpoint are read for it.
        return Start.from_json(world.mailbox.broadcast(timeout=math.inf)), None
    # An attempt that the launcher has restarted goes on in the folder of the first.
    path = asked.output.run_dir or world.first_said("run_dir", str(default_path()))
    mine = secrets.token_hex()
    restarted = world.first_said("began", mine) != mine
    folder = RunDirectory(Path(path))
    folder.claim()
    found = start_of(asked, folder.path, restarted=restarted)
    world.mailbox.broadcast(found.to_json())
    return found, folder


def _checkpoints(folder: Path, config: RunConfig) -> Checkpoints:
    return replace(
        config.checkpoints,
        folder=folder / RunDirectory.CHECKPOINTS,
        about={"config": config.options(), "versions": versions()},
    )


def _trainer(
    config: RunConfig,
    material: Material,
    world: World,
    *,
    observer: Observer | None = None,
    weights: Path | None = None,
    fits: bool = True,
) -> Trainer:
    """What trains the configured network.

    Args:
        fits: whether what is fitted to a memory budget is still open.
    """
    layers = _layers(config, material.facts)
    trainer = Trainer(
        layers,
        loss=task(config, material.facts),
        optimizer=optimizer(config, layers),
        learning_rate=learning_rate(config, material.steps_per_epoch),
        cut=replace(
            config.cut,
            local_loss=local_loss(config, material.facts),
            model=config.network.model,
        ),
        guidance=config.guidance,
        gradients=config.gradients,
        memory=config.memory if fits else replace(config.memory, budget=None),
        machine=config.machine,
        edges=config.edges,
        observer=observer,
        world=world,
    )
    if weights:
        trainer.load(weights)
    return trainer


def _layers(config: RunConfig, facts: Facts) -> list[Layer]:
    """Of the configured network."""
    # Layers are drawn where they live; a module that is split is drawn as a whole, everywhere alike.
    with Draws(config.machine.seed, "network").seeded():
        return models.build(
            config.network.model,
            **facts.for_network(),
            **{size: getattr(config.network, size) for size in models.SIZES},
            untie=config.network.untie,
        )


@contextmanager
def _failing_together(world: World) -> Iterator[None]:
    """Lets one worker's mistake end all of them, reported once."""
    if world.size > 1:
        signal.signal(signal.SIGTERM, lambda *_: _linger(world))
    try:
        yield
    except UserError as error:
        error.already_reported = not world.mailbox.fail(str(error))
        raise
    except (WorkerError, Stopped):
        raise
    except BaseException as error:  # sys.exit, too, takes a worker from the others
        if world.size == 1:
            raise
        if not isinstance(error, Exception):
            fail(world, error)
            raise
        failure = WorkerError(fail(world, error))
        failure.already_reported = True
        raise failure from error


def _linger(world: World) -> None:
    """Gives the edges a moment to name the culprit before the launcher's SIGTERM is obeyed.

    A launcher that sees one worker die ends the others at once, perhaps before a neighbour
    has noticed who it was.
    """
    deadline = time.monotonic() + _LINGER_SECONDS
    while not (failure := world.mailbox.failure()) and time.monotonic() < deadline:
        time.sleep(0.05)
    world.recent.write(failure or "ended by its launcher")
    os._exit(128 + signal.SIGTERM)
