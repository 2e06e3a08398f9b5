"""How a stage's parameters move: its optimizer or two, and the learning rate of a step."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pglpipe.errors import ConfigError, DataError, PglpipeError, setting
from pglpipe.stage.settings import Learning, OptimizerFactory
from pglpipe.utils.arguments import described
from pglpipe.utils.seeding import Draws
from pglpipe.utils.snapshot import Snapshot

OPTIMIZER_EXAMPLE = "lambda parameters: torch.optim.SGD(parameters, lr=0.1)"
_PARTS = ("param_groups", "state", "step", "zero_grad")  # what is used of an optimizer


class Updates:
    """The optimizers of one stage.

    Args:
        parameters: of its body and head, by name.
        learning: what makes the optimizers and chooses the learning rate.
        stage: whose they are, which what an optimizer draws depends on.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], learning: Learning, stage: int = 0
    ) -> None:
        self._named = parameters
        self._parameters = list(parameters.values())
        self._learning = learning
        self._was_guided: bool | None = None
        self._goes_on = False
        self._optimizers: list[torch.optim.Optimizer] = []
        if parameters:
            count = 2 if learning.gradients.guided_optimizer == "separate" else 1
            self._optimizers = [
                make_optimizer(learning.optimizer, parameters) for _ in range(count)
            ]
        known = all(type(o).__module__.startswith("torch.") for o in self._optimizers)
        # PyTorch's own draw nothing.
        self._draws = Draws(learning.machine.seed, "update", stage, always=not known)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
        # As they were asked for; some optimizers keep what they learn among them.
        self._asked = [_groups(optimizer) for optimizer in self._optimizers]

    def check(self) -> None:
        """Refuses a function that makes another optimizer each time.

        Raises:
            ConfigError: it does.
        """
        for optimizer, asked in zip(self._optimizers[:1], self._asked, strict=False):
            again = _call(self._learning.optimizer, self._named)
            same = type(again) is type(optimizer)
            if not same or repr(_as_made(_groups(again))) != repr(_as_made(asked)):
                raise ConfigError(
                    f"expected {setting('optimizer')} to make the same optimizer of the same parameters, got other options "
                    "the second time; every worker asks it for its stages, so have it neither count nor draw"
                )

    def zero_grad(self) -> None:
        """Forgets the gradients of the last step."""
        for optimizer in self._optimizers[:1]:  # all of them have the same parameters
            optimizer.zero_grad()

    def apply(self, step: int, total_steps: int, *, guided: bool) -> None:
        """One step of the optimizer that is in charge, at the learning rate of this step."""
        if not self._optimizers:
            return
        optimizer = self._optimizers[-1 if guided else 0]
        switched = self._was_guided is not None and self._was_guided != guided
        if switched and self._learning.gradients.guided_optimizer == "reset":
            optimizer.state.clear()
        self._was_guided = guided
        factor = self._learning.learning_rate(step, total_steps)
        if guided:
            factor *= self._learning.gradients.guided_lr_scale
        rates = [group["initial_lr"] * factor for group in optimizer.param_groups]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        with self._draws.seeded(step):
            self._step(optimizer)
        if any(
            g["lr"] != r for g, r in zip(optimizer.param_groups, rates, strict=True)
        ):
            raise ConfigError(
                f"expected {setting('optimizer')} to leave its learning rate, which {setting('learning_rate')} sets before "
                "every step, but its step changes it; say there what a scheduler would do"
            )

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        try:
            optimizer.step()
        except KeyError as error:
            if not self._goes_on:
                raise
            raise ConfigError(
                f"expected the checkpoint to hold {error} of every parameter, which {setting('optimizer')} needs with the "
                "options that it has now; resume with those that it had"
            ) from error

    # -- checkpoints ------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """What the optimizers remember: ``OPTIMIZER.PARAMETER.NAME``, both counted from 0, in the stage's order.

        Raises:
            ConfigError: an optimizer remembers what is neither a tensor nor a number.
        """
        found = Snapshot(numbers={"was_guided": self._was_guided})
        for number, optimizer in enumerate(self._optimizers):
            found.numbers[f"{number}.groups"] = _plain("groups", _groups(optimizer))
            found.numbers[f"{number}.asked"] = _plain("groups", self._asked[number])
            found.numbers[f"{number}.kind"] = type(optimizer).__qualname__
            for index, parameter in enumerate(self._parameters):
                for name, value in optimizer.state.get(parameter, {}).items():
                    key = f"{number}.{index}.{name}"
                    if not isinstance(value, Tensor):
                        found.numbers[key] = _plain(key, value)
                        continue
                    found.tensors[key] = value
                    if value.device != parameter.device:
                        found.numbers[f"{key}.device"] = str(value.device)
        return found

    @torch.no_grad()
    def load(self, snapshot: Snapshot) -> None:
        """Has the optimizers remember what others did; options that they were given stay theirs.

        Raises:
            DataError: the others were not as many, of another kind, or with other groups of parameters.
        """
        self._was_guided, self._goes_on = snapshot.numbers["was_guided"], True
        expected = {f"{number}.groups" for number, _ in enumerate(self._optimizers)}
        groups = {key for key in snapshot.numbers if key.endswith(".groups")}
        if expected != groups:
            raise DataError(
                f"expected {len(expected)} optimizers in the checkpoint, got {len(groups)}"
            )
        for number, optimizer in enumerate(self._optimizers):
            known = [
                snapshot.numbers[f"{number}.{what}"] for what in ("groups", "asked")
            ]
            saved_as = snapshot.numbers[f"{number}.kind"], len(known[0])
            mine = type(optimizer).__qualname__, len(optimizer.param_groups)
            if saved_as != mine:
                raise DataError(
                    f"expected {setting('optimizer')} to make what the checkpoint was made with, {_described(*saved_as)}, "
                    f"got {_described(*mine)}; resume with the former, or begin anew"
                )
            now = json.loads(
                json.dumps(self._asked[number])
            )  # as what was saved is spelled
            every = zip(optimizer.param_groups, now, *known, strict=True)
            for group, asked, saved, before in every:
                same = {k: v for k, v in saved.items() if asked.get(k) == before.get(k)}
                group.update(_as_tuples(group, same))
            state = snapshot.part(str(number))
            for index, parameter in enumerate(self._parameters):
                own = state.part(str(index))
                if not own.tensors and not own.numbers:
                    continue
                optimizer.state[parameter] = {
                    **{k: v for k, v in own.numbers.items() if "." not in k},
                    **{
                        k: _placed(t, parameter, own, k) for k, t in own.tensors.items()
                    },
                }


def make_optimizer(
    factory: OptimizerFactory, parameters: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer of a stage, from what the user has given.

    Args:
        parameters: of the stage, by name.

    Raises:
        ConfigError: the user's function fails, or returns something else.
    """
    name = setting("optimizer")
    try:
        made = _call(factory, parameters)
    except PglpipeError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"expected {name} to make an optimizer from the parameters of a stage, but it fails: "
            f"{type(error).__name__}: {reason}; pass {OPTIMIZER_EXAMPLE}"
        ) from error
    if not all(hasattr(made, part) for part in _PARTS):
        raise ConfigError(
            f"expected {name} to return an optimizer, got {described(made)}; pass {OPTIMIZER_EXAMPLE}"
        )
    if needs_closure(type(made)):
        raise ConfigError(
            f"expected {name} to return an optimizer whose step needs no closure, got {described(made)}; "
            "choose another, such as torch.optim.SGD"
        )
    if not all("lr" in group for group in made.param_groups):
        raise ConfigError(
            f"expected {name} to return an optimizer with a learning rate 'lr' in each of its groups, got "
            f"{described(made)} without; choose another, such as torch.optim.SGD"
        )
    own = {id(parameter) for parameter in parameters.values()}
    if any(id(p) not in own for group in made.param_groups for p in group["params"]):
        raise ConfigError(
            f"expected {name} to make an optimizer of the parameters that it is given, those of a stage, got one of others; "
            f"pass {OPTIMIZER_EXAMPLE}"
        )
    return made


def _call(
    factory: OptimizerFactory, parameters: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """What a user's function makes of parameters, or of names and parameters if that is what it calls its argument."""
    try:
        first, *_ = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        first = ""
    wants_names = first == "named_parameters"
    return factory(list(parameters.items() if wants_names else parameters.values()))


def needs_closure(kind: type[Any]) -> bool:
    """Whether steps of a class of optimizers must be given a function that computes the loss again, as LBFGS' must."""
    try:
        given = inspect.signature(kind.step).parameters.values()
    except (AttributeError, TypeError, ValueError):
        return False
    _, *others = given  # without self
    varying = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(p.default is p.empty and p.kind not in varying for p in others)


def _as_made(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k != "initial_lr"} for group in groups]


def _described(kind: str, groups: int) -> str:
    return f"{kind} with {groups} group{'s' if groups > 1 else ''} of parameters"


def _groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The options of each group of parameters."""
    return [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]


def _plain(name: str, value: Any) -> Any:
    try:
        json.dumps(value)
    except TypeError:
        raise ConfigError(
            f"expected an optimizer that remembers tensors and numbers for checkpoints, got {name} of "
            f"type {type(value).__name__}"
        ) from None
    return value


def _as_tuples(group: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists only."""
    return {
        name: tuple(value) if isinstance(group.get(name), tuple) else value
        for name, value in options.items()
    }


def _placed(
    tensor: Tensor, parameter: nn.Parameter, state: Snapshot, name: str
) -> Tensor:
    """A tensor of the state where it was: beside its parameter, or apart from it."""
    return tensor.to(state.numbers.get(f"{name}.device", parameter.device))
