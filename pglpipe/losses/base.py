"""What a local loss is, and the module that it is computed from.

::

    image ┈┈┈┈┈┈┈┈┈┈┈┈┈┈┈┈┈┈┈┈┈┈┈┈┈┈┈┈┈┈┐
    h ─┬▶ head ───▶ its output ────────┬▶ loss(head_output, targets, image, depth_fraction) ─▶ scalar
       └▶ branch ─▶ its output ────────┘
       the module that auxiliary() makes

A head with a front of its own (:class:`~pglpipe.utils.modules.Fronted`) hands the branch what that puts out.

Letters: B samples, C channels, H and W the sides of an image or a map, F features, N classes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pglpipe.losses.parts import shares
from pglpipe.utils.in_place import changes_samples
from pglpipe.utils.modules import Fronted
from pglpipe.utils.options import Section

Shape = tuple[int, ...]  # of one sample

# Of a head's output and the targets, averaged over the batch.
Loss = Callable[[Tensor, Tensor], Tensor]


class LocalLoss(ABC):
    """What a stage with a head minimizes in a local step.

    The same object serves all stages of a run. How it is used::

        width = loss.outputs(num_classes)                      # the head is made that wide
        auxiliary = loss.auxiliary(head, shape, image_shape)   # and trained as this module
        image = loss.image(x) if loss.image else None          # on the first worker, sent along

        loss(auxiliary(h), targets, image, depth_fraction).backward()   # in every stage with a head

    A loss of one's own overrides what differs.

    Attributes:
        classifies: whether the head's outputs are logits of the classes, so that the stage is an exit.
        compares: whether it compares the samples of a batch with each other: parts of a batch
            then have another loss than the whole, and another meaning.
    """

    classifies = True
    compares = False

    def outputs(self, num_classes: int) -> int:
        """How many outputs the head shall have for so many classes."""
        return num_classes

    def auxiliary(self, head: nn.Module, shape: Shape, image_shape: Shape) -> nn.Module:
        """The head with whatever else is trained beside it, as one module.

        Args:
            head: from ``[B, *shape]`` to ``[B, outputs]``.
            shape: of one sample's activation, ``(C, H, W)`` or ``(F,)``.
            image_shape: of one sample of the network's input, ``(C, H, W)`` for images.

        Returns:
            The head itself, or a :class:`Beside` that holds it.

        Raises:
            ConfigError: the loss cannot be computed from such activations or images.
        """
        return head

    @property
    def image(self) -> Callable[[Tensor], Tensor] | None:
        """Makes what must travel with the activation; None where the loss wants to see no image.

        From the network's input ``[B, C, H, W]``, normalized, to the images as they were before that,
        ``[B, C, H, W]``, uint8.
        """
        return None

    @abstractmethod
    def __call__(
        self,
        head_output: Any,
        targets: Tensor,
        image: Tensor | None = None,
        depth_fraction: float = 0.0,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            head_output: what the auxiliary module returned: the head's output, or a tuple that
                begins with it.
            targets: ``[B]``, class indices.
            image: ``[B, C, H, W]``, uint8; None without :attr:`image`.
            depth_fraction: how far along the stages with a head this one is, from 0 to 1.

        Returns:
            A scalar, averaged over the batch.
        """

    def modules(self) -> list[nn.Module]:
        """What has weights of its own, to be where the activations are; empty for most."""
        return []

    def shares(
        self, parts: Sequence[Tensor], shape: Sequence[int], option: str
    ) -> list[float]:
        """What the losses of a batch's parts count for in the loss of the whole batch.

        Args:
            parts: the targets of each, ``[B, ...]``.
            shape: of the head's output for one sample.
            option: what asks for parts, for messages.
        """
        total = sum(map(len, parts))
        return [len(part) / total for part in parts]

    @property
    def evaluated(self) -> Loss:
        """The loss of the head's output alone that an evaluation reports, if the head classifies."""
        return nn.functional.cross_entropy

    def evaluate(self, output: Tensor, targets: Tensor) -> Tensor:
        """What an evaluation reports of the head's output alone ``[B, N]``; a scalar.

        Cross-entropy where the head classifies, else not a number.
        """
        if self.classifies:
            return nn.functional.cross_entropy(output, targets)
        return output.new_full((), math.nan)


class Supervised(LocalLoss):
    """A loss of the head's output and the targets alone.

    Args:
        loss: ``(logits [B, N], targets [B]) -> scalar``.
    """

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    def __call__(
        self,
        head_output: Any,
        targets: Tensor,
        image: Tensor | None = None,
        depth_fraction: float = 0.0,
    ) -> Tensor:
        return self.loss(head_output, targets)

    def modules(self) -> list[nn.Module]:
        return [self.loss] if isinstance(self.loss, nn.Module) else []

    def shares(
        self, parts: Sequence[Tensor], shape: Sequence[int], option: str
    ) -> list[float]:
        return shares(self.loss, parts, shape, option)

    @property
    def evaluated(self) -> Loss:
        return self.loss

    def evaluate(self, output: Tensor, targets: Tensor) -> Tensor:
        return self.loss(output, targets)


class Beside(nn.Module):
    """A head and a branch that both read the same activation, or what the head's front makes of it.

    Neither disturbs what the other reads: a head that would overwrite its input works on a copy.

    Args:
        head: what tells the classes.
        branch: what is trained beside it; it must leave its input as it is.
        shape: of one sample of the activation.
    """

    def __init__(self, head: nn.Module, branch: nn.Module, shape: Shape) -> None:
        super().__init__()
        self.branch = branch
        self.head = head
        self._copies = changes_samples(head, shape)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """From the activation ``[B, ...]`` to the outputs of head and branch."""
        if isinstance(self.head, Fronted):
            output, h = self.head.both(self._readable(h))
        else:
            output = self.exit(h)
        return output, self.branch(h)

    def exit(self, h: Tensor) -> Tensor:
        """The head's output alone, for evaluation; the activation stays as it is."""
        output: Tensor = self.head(self._readable(h))
        return output

    def _readable(self, h: Tensor) -> Tensor:
        return h.clone() if self._copies else h


def branch_shape(head: nn.Module, shape: Shape) -> Shape:
    """Of one sample of what a branch beside the head reads.

    Args:
        shape: of the stage's activation.
    """
    return head.shape if isinstance(head, Fronted) else shape


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Turns autocast off where the tensor lives."""
    device = tensor.device.type
    # Autocast knows no device called meta.
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32 if it has a narrower type."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@dataclass(frozen=True)
class LossFacts:
    """What a loss may need to know of a run.

    Attributes:
        model, dataset: their names.
        stages: of the network.
        mean, std: by which images were normalized, per channel, of pixels in [0, 1].
    """

    model: str = ""
    dataset: str = ""
    stages: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


@dataclass(frozen=True)
class LossKind:
    """An entry of the registry.

    Attributes:
        make: makes the loss from the facts of a run and from its options, if it has any.
        options: its hyper-parameters.
    """

    make: Callable[[LossFacts, Any], LocalLoss]
    options: type[Section] | None = None
