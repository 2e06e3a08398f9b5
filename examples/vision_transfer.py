"""Fine-tune a network of torchvision on your images, in a pipeline.

    torchrun --nproc_per_node=2 examples/vision_transfer.py --images FOLDER --weights resnet18.pt

FOLDER has train/CLASS/*.jpg and test/CLASS/*.jpg. The weights are a state_dict as torchvision publishes it; all but the last layer is
taken. The stem and the first group of blocks stay as they are. Without arguments the images are random and the weights fresh: that shows
that everything runs.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import models, transforms
from torchvision.datasets import FakeData, ImageFolder

import pglpipe


def loaders(folder: str, side: int, batch: int) -> tuple[DataLoader, DataLoader, int]:
    """Training and test batches, and the number of classes."""
    steps = [transforms.Resize((side, side)), transforms.ToTensor()]
    seen = transforms.Compose(
        [*steps, transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    )
    if folder:
        train, test = (
            ImageFolder(f"{folder}/{part}", seen) for part in ("train", "test")
        )
        classes = len(train.classes)
    else:
        classes = 4
        train, test = (
            FakeData(size, (3, side, side), classes, seen) for size in (32, 16)
        )
    return (
        DataLoader(train, batch, shuffle=True, drop_last=True),
        DataLoader(test, batch),
        classes,
    )


def network(weights: str, classes: int) -> nn.Module:
    """A ResNet-18 with a new last layer, whose first layers do not learn."""
    model = models.resnet18(num_classes=classes)
    if weights:
        known = torch.load(weights, weights_only=True)
        kept = {
            name: value for name, value in known.items() if not name.startswith("fc.")
        }
        model.load_state_dict(kept, strict=False)
    for part in (model.conv1, model.bn1, model.layer1):
        part.requires_grad_(False)
    return model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", default="")
    parser.add_argument("--weights", default="")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=1)
    given = parser.parse_args()

    torch.manual_seed(0)  # every worker builds the same weights
    train, test, classes = loaders(given.images, given.side, given.batch)
    model = network(given.weights, classes)
    example = torch.zeros(2, 3, given.side, given.side)
    trainer = pglpipe.Trainer(
        pglpipe.split(model, example, at=["layer2", "layer3", "layer4"]),
        loss=pglpipe.Task(
            nn.CrossEntropyLoss(label_smoothing=0.1),
            metrics=["top5"] if classes > 5 else [],
        ),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
        learning_rate=pglpipe.cosine(),
        cut=pglpipe.Cut(4, head="0c2f"),
    )
    summary = trainer.fit(train, epochs=given.epochs, evaluate=test)
    trainer.export("resnet18-tuned.pt")  # a state_dict for torchvision's resnet18
    print(summary.exit_accuracy, summary.parameters_sha256[:12])
    trainer.close()


if __name__ == "__main__":
    main()
