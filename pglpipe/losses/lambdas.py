"""The published weights of InfoPro's two terms.

They were found for the contrastive task. None were published for cross-entropy; AugLocal's
experiments (arXiv 2402.17318) take these for it as they are.

Source: the commands published with InfoPro (Wang et al. 2021, arXiv 2101.10832). Its rows
"InfoPro*" belong to other cuts of the same networks, which balance memory, and are left out:
network, data set and number of stages cannot tell them apart from these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pglpipe.errors import ConfigError, setting, shown
from pglpipe.utils.arguments import text
from pglpipe.utils.options import Section, option

# Of reconstruction (ixx) and task (ixy), in the first stage (1) and the last with a head (2).
Lambdas = tuple[float, float, float, float]  # ixx_1, ixy_1, ixx_2, ixy_2

# By model, data set and number of stages.
LAMBDAS: dict[tuple[str, str], dict[int, Lambdas]] = {
    ("resnet32", "cifar10"): {
        2: (5, 1, 0, 0),
        4: (6, 0, 1, 2),
        8: (5, 0, 0, 2),
        16: (5, 0.05, 0.2, 0.5),
    },
    ("resnet110", "cifar10"): {
        2: (5, 0.5, 0, 0),
        4: (1, 0, 0, 1),
        8: (5, 0, 0, 1),
        16: (5, 0, 0.5, 1),
    },
    ("resnet110", "stl10"): {
        2: (10, 1, 0, 0),
        4: (20, 0.2, 5, 2),
        8: (20, 0.2, 5, 1),
        16: (20, 0.5, 10, 0.1),
    },
    ("resnet110", "svhn"): {
        2: (1, 0.1, 0, 0),
        4: (5, 0, 0.5, 1),
        8: (5, 0, 0.5, 2),
        16: (5, 0.2, 0.5, 1),
    },
}


@dataclass(frozen=True, kw_only=True)
class InfoProOptions(Section, title="Local loss infopro", prefix="infopro_"):
    """The hyper-parameters of InfoPro.

    Attributes:
        lambdas: the weights of reconstruction and task, of the first and of the last head; ``"published"`` for
            those of the paper, which there are for some networks and data sets.
    """

    lambdas: str = option(
        "published",
        "weights of InfoPro's reconstruction and task, of the first and of the last head: "
        "5,0.05,0.2,0.5; or published, for the networks and data sets of the paper",
        text(),
    )

    def resolve(self) -> None:
        """Reads them."""
        self.weights  # noqa: B018

    @property
    def weights(self) -> Lambdas | None:
        """As numbers; None for the published ones."""
        return None if self.lambdas == "published" else as_lambdas(self.lambdas)


def published_lambdas(model: str, dataset: str, num_stages: int) -> Lambdas:
    """The published ``(ixx_1, ixy_1, ixx_2, ixy_2)`` of a network, a data set and a cut.

    Raises:
        ConfigError: none were published.

    >>> published_lambdas("resnet32", "cifar10", 4)
    (6, 0, 1, 2)
    """
    lambdas = LAMBDAS.get((model, dataset), {}).get(num_stages)
    if lambdas is None:
        known = "; ".join(
            f"{known_model} on {known_dataset} in {', '.join(map(str, by_stages))}"
            for (known_model, known_dataset), by_stages in LAMBDAS.items()
        )
        raise ConfigError(
            f"no weights of infopro were published for {model} on {dataset} in {num_stages} "
            f"stages, only for {known}; give {setting('infopro_lambdas')}"
        )
    return lambdas


def as_lambdas(text: str) -> Lambdas:
    """Four weights as they are typed.

    Raises:
        ConfigError: the text is not four numbers of at least 0.

    >>> as_lambdas("5,0.05,0.2,0.5")
    (5.0, 0.05, 0.2, 0.5)
    """
    try:
        a, b, c, d = map(float, text.split(","))
        if not all(0 <= number < math.inf for number in (a, b, c, d)):
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"expected four numbers for {setting('infopro_lambdas')}, such as 5,0.05,0.2,0.5, none of them below 0, "
            f"or published; got {shown(text)}"
        ) from None
    return a, b, c, d
