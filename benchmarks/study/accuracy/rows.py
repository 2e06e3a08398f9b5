"""The rows of the table of accuracy: what is trained, at which scale, in which order.

A row is a method at a place. A *place* is what the network is cut into, the heads and their
loss; a *method* is when the stages hear from the true loss, and what they do then::

    pgl-10 - k16 - 1c2f                 local - k8 - 1c2f - infopro
    method   K     head                 method  K    head   local loss
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.study.accuracy.scales import Options, Scale
from pglpipe.losses import LAMBDAS

# Seed 0 chose among the forms; what is claimed rests on others.
ONE, THREE = (1,), (1, 2, 3)


def every(period: int, duration: int = 1, unit: str = "step") -> Options:
    """A window at the end of each period, so that the last word of a run is a guided one."""
    return {
        "guidance-period": period,
        "guidance-duration": duration,
        "guidance-warmup": period - duration,
        "guidance-unit": unit,
    }


def phase(**options: Any) -> Options:
    """Nothing but one phase, counted in epochs; its words have _ for -."""
    named = {name.replace("_", "-"): value for name, value in options.items()}
    return {**every(1, 0, "epoch"), "guidance-warmup": 0, **named}


def stale(delay: int = 1, **options: Any) -> Options:
    """A stale gradient for every batch; its words have _ for -."""
    named = {name.replace("_", "-"): value for name, value in options.items()}
    reach = {"guidance-reach": "stale", "guidance-delay": delay}
    return {**every(1), **reach, **named}


def window(stages: int, reach: str = "window") -> Options:
    """Gradients that cross so many stages, at every step."""
    return {**every(1), "guidance-reach": reach, "guidance-window": stages}


def tenth(scale: Scale, share: int = 10) -> int:
    """A tenth of the epochs, or so many hundredths."""
    return max(1, round(scale.epochs * share / 100))


@dataclass(frozen=True)
class Method:
    """When the stages hear from the true loss.

    Attributes:
        title: what the table calls it.
        options: of the command line, at some scale.
        local_epochs: those at the beginning that are local learning and nothing else.
    """

    title: str
    options: Callable[[Scale], Options]
    local_epochs: Callable[[Scale], int] = lambda scale: 0


def _fixed(title: str, options: Options) -> Method:
    return Method(title, lambda scale: options)


def _at_the_end(title: str, share: int = 10, **options: Any) -> Method:
    """So many hundredths of the epochs end to end, after all others."""
    return Method(
        title,
        lambda scale: phase(guidance_final=tenth(scale, share), **options),
        local_epochs=lambda scale: scale.epochs - tenth(scale, share),
    )


METHODS: dict[str, Method] = {
    "end-to-end": _fixed("end to end", every(1)),
    "local": _fixed("local only", every(1, 0)),
    **{
        f"pgl-{100 // period}": _fixed("PGL, single steps", every(period))
        for period in (50, 20, 10, 5, 4, 2)
    },
    "bursts": _fixed("PGL, 5 of 50 steps", every(50, 5)),
    "epochs": Method(
        "PGL, whole epochs", lambda scale: every(min(10, scale.epochs), 1, "epoch")
    ),
    "epochs-25": _fixed("PGL, whole epochs", every(4, 1, "epoch")),
    "window-2": _fixed("windows of 2 stages", window(2)),
    "window-4": _fixed("windows of 4 stages", window(4)),
    "stale-window-2": _fixed("stale windows of 2 stages", window(2, "stale-window")),
    "stale-window-4": _fixed("stale windows of 4 stages", window(4, "stale-window")),
    "stale-1": _fixed("stale", stale()),
    "stale-2": _fixed("stale, delay 2", stale(2)),
    "stale-shrunk": _fixed("stale, shrunk by half", stale(guided_shrink=0.5)),
    "stale-10": _fixed("stale, every 10th batch", {**stale(), **every(10)}),
    "stale-local": _fixed(
        "stale beside local", stale(guided_local_weight=1.0, guided_heads="trained")
    ),
    "heads": _fixed("PGL, heads trained", {**every(10), "guided-heads": "trained"}),
    "beside": _fixed(
        "PGL beside local",
        {**every(10), "guided-heads": "trained", "guided-local-weight": 1.0},
    ),
    "reset": _fixed("PGL, momentum reset", {**every(10), "guided-optimizer": "reset"}),
    "separate": _fixed(
        "PGL, momentum of its own", {**every(10), "guided-optimizer": "separate"}
    ),
    "lr": _fixed("PGL, three times the lr", {**every(10), "guided-lr-scale": 3.0}),
    "final": _at_the_end("end to end at the end", final_lr=0.0),
    "final-anew": _at_the_end("end to end at the end, from lr / 2", final_lr=0.5),
    "final-lr-1": _at_the_end("end to end at the end, from lr", final_lr=1.0),
    "final-lr-2": _at_the_end("end to end at the end, from 2 lr", final_lr=2.0),
    **{
        f"final-anew-{share}": _at_the_end(
            "end to end at the end, from lr / 2", share, final_lr=0.5
        )
        for share in (5, 20, 50)
    },
    "warmup": Method(
        "end to end at the start",
        lambda scale: phase(
            guidance_warmup=tenth(scale), guidance_warmup_kind="global"
        ),
    ),
}


# What local learning with a head is called.
KNOWN = {
    "0c1f": "greedy",
    "1c2f": "greedy",
    "mlp-sr": "DGL",
    "auglocal-1": "AugLocal, depth 1",
    "auglocal-2": "AugLocal, depth 2",
    # As costly as a block, and no more than wider or deeper than 1c2f.
    "1c3f": "greedy, a wider head",
    "2c2f": "greedy, a deeper head",
    "man": "MAN",
    "solo": "SOLO",
    "thin-3": "thin copies, 3 layers",
}


@dataclass(frozen=True)
class Row:
    """One line of the table: a method at a place, for some seeds."""

    method: str
    stages: int
    head: str
    loss: str = "ce"
    seeds: tuple[int, ...] = ONE

    @property
    def place(self) -> str:
        """What it is trained with, whatever the method."""
        loss = "" if self.loss == "ce" else f"-{self.loss}"
        return f"k{self.stages}-{self.head}{loss}"

    @property
    def name(self) -> str:
        """Of its folder, and on the command line."""
        return self.method if self.stages == 1 else f"{self.method}-{self.place}"

    @property
    def title(self) -> str:
        """What the table calls it; a method that has a name of its own goes by that."""
        title = METHODS[self.method].title
        if self.loss == "infopro":
            known = "InfoPro, softmax"
        else:
            known = KNOWN[self.head]
        if self.method == "local":
            return known
        return title if known == "greedy" else f"{title}, on {known}"

    def local_steps(self, scale: Scale) -> int:
        """Steps at the beginning that are those of local learning at the same place."""
        return scale.steps_per_epoch * METHODS[self.method].local_epochs(scale)

    @property
    def local(self) -> Row:
        """Local learning at the same place."""
        return Row("local", self.stages, self.head, self.loss)

    def options(self, scale: Scale, seed: int) -> Options:
        """The command line's options of one run."""
        return {
            **place_options(scale, self.stages, self.head, self.loss),
            **METHODS[self.method].options(scale),
            "seed": seed,
        }


def place_options(scale: Scale, stages: int, head: str, loss: str) -> Options:
    """The command line's options of a place."""
    options = {
        **scale.common,
        "stages": stages,
        # Only real cuts were published.
        "balance": scale.balance if stages > 1 else "flops",
        "head": head,
        "local-loss": loss,
    }
    if loss.startswith("infopro"):
        # By name they are found for the data set itself only, and here it is an image folder.
        lambdas = LAMBDAS["resnet32", "cifar10"][stages]
        options["infopro-lambdas"] = ",".join(map(str, lambdas))
    return options


# The most telling places first.
PLACES = ((16, "1c2f"), (8, "1c2f"), (16, "0c1f"), (8, "0c1f"))
CLAIMS = ("local", "pgl-10", "stale-1")
# Forms that looked best with seed 0.
PROMISING = ("window-4", "final-anew")
# Other learning rates for a phase at the end.
RESTARTS = "final-lr-1", "final-lr-2"
SHARES = (
    *("final-anew-5", "final-anew-20", "final-anew-50"),
    *("pgl-20", "pgl-50", "pgl-5", "pgl-2"),
)
SHAPES = (
    *("bursts", "window-2", "stale-window-2", "stale-window-4"),
    *("stale-2", "final", "epochs"),
)
OTHERS = ("stale-shrunk", "stale-local", "stale-10", "warmup")
VARIANTS = ("heads", "beside", "reset", "separate", "lr")


def rows(scale: Scale) -> list[Row]:
    """All rows that this scale's network can be cut for, the most telling first."""
    found = [Row("end-to-end", 1, "0c1f", seeds=THREE)]
    if scale.name == "first":
        more = "pgl-25", "epochs", "epochs-25"
        return [
            *found,
            *_at(("local", "pgl-10"), [(8, "1c2f")], THREE),
            *_at(("local", "pgl-10"), [(8, "0c1f")]),
            *_at(more, [(8, "0c1f"), (8, "1c2f")]),
        ]
    found += [Row("local", k, "auglocal-1", seeds=THREE) for k in (16, 8)]
    found += _at((*CLAIMS[:1], *PROMISING), PLACES[:1], THREE)
    found += _at(CLAIMS[1:], PLACES[:1], THREE)
    found += [Row("final-anew", k, "auglocal-1") for k in (16, 8)]
    found += _at(RESTARTS, ((16, "auglocal-1"), *PLACES[:1]))
    found += [Row("local", 16, head) for head in ("2c2f", "1c3f")]
    found += _at((*CLAIMS, *PROMISING), PLACES[1:])
    found += [Row("local", k, "mlp-sr") for k in (16, 8)]
    found += [Row("local", k, "1c2f", "infopro") for k in (16, 8)]
    found += _at((*SHARES, *SHAPES), PLACES[:2])
    found += _at(SHARES, PLACES[2:])
    found += _at((*OTHERS, *VARIANTS), PLACES[:2])
    found += [Row("pgl-10", k, "mlp-sr") for k in (16, 8)]
    found += [Row("pgl-10", k, "1c2f", "infopro") for k in (16, 8)]
    found += _at((*CLAIMS, "final-anew"), ((4, "1c2f"), (2, "1c2f")))
    found += [Row("local", k, "auglocal-1") for k in (4, 2)]
    found += _at(
        ("final-lr-1",),
        ((8, "1c2f"), (4, "1c2f"), (8, "auglocal-1"), (4, "auglocal-1")),
    )
    found += [Row("local", 16, h) for h in ("auglocal-2", "thin-3", "man", "solo")]
    found += _at((*SHAPES, *OTHERS), PLACES[2:])
    return [row for row in found if row.stages in (1, *scale.stages)]


def _at(
    methods: Iterable[str],
    places: Iterable[tuple[int, str]],
    seeds: tuple[int, ...] = ONE,
) -> list[Row]:
    places = tuple(places)
    return [Row(method, *place, seeds=seeds) for method in methods for place in places]
