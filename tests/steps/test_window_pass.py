"""Gradients of several losses side by side: what they look like, and what refuses them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from testing.worlds import image_batches, train
from torch import Tensor, nn

from pglpipe import Guidance
from pglpipe.models.layer import Layer
from pglpipe.schedules.windows import losses_passing
from pglpipe.stage.backward import GuidedBackward

pytestmark = pytest.mark.usefixtures("planned_quickly")


class Turns(nn.Module):
    """Its gradient lies in memory in another order than its input."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order
        self.weight = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = (x.contiguous() * self.weight).tanh()
        back = [self.order.index(i) for i in range(4)]
        return y.permute(self.order).contiguous().permute(back)


def layers() -> list[Layer]:
    orders = [(0, 1, 2, 3), (0, 2, 3, 1), (0, 3, 1, 2), (3, 2, 0, 1)]
    made = [Layer(f"turns{i}", lambda o=o: Turns(*o)) for i, o in enumerate(orders)]
    end = lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 10))  # noqa: E731
    return [*made, Layer("end", end)]


@pytest.mark.parametrize("window", [2, 3, 5])
def test_gradients_lie_in_memory_alike_on_any_number_of_workers(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seen(size: int) -> dict[int, Any]:
        found: dict[int, Any] = defaultdict(list)
        plain = GuidedBackward.backward_window

        def watched(
            self: GuidedBackward, arriving: Mapping[int, Any], *others: Any
        ) -> tuple[dict[int, Any], Tensor]:
            for loss, gradients in sorted(arriving.items()):
                x = gradients["x"]
                layout = x.stride(), x.storage_offset()
                found[self._index].append((loss, *layout))
            return plain(self, arriving, *others)

        with monkeypatch.context() as patch:
            patch.setattr(GuidedBackward, "backward_window", watched)
            train(
                size,
                layers(),
                image_batches(8, 8, 5),
                stages=5,
                balance="1,1,1,1,1",
                head="0c1f",
                microbatches=2,
                guidance=Guidance(period=1, reach="window", window=window),
            )
        return found

    expected = seen(1)
    for index in range(4):
        losses = [loss for loss, *_ in expected[index]]
        assert losses == losses_passing(index + 1, window, 5) * 6
    assert seen(2) == expected
    assert seen(5) == expected
