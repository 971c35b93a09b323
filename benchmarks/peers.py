"""The same training as benchmarks/bare.py in other libraries, as their documentation shows it.

    python3 -m benchmarks.peers poutyne N_TRAIN N_EPOCHS      # or lightning; prints the seconds of each epoch

A DataLoader of torchvision's PIL transforms, with 0 or 2 workers, whichever took less in the first epoch's 20 batches.
"""

import sys
import time
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.synthetic import MEAN, STD, images


class Images(Dataset):
    """PIL images and labels, as torchvision's CIFAR10 gives them."""

    def __init__(self, n: int, seed: int, steps: list[Any]) -> None:
        x, y = images(n, seed=seed)
        self.x, self.y = x.permute(0, 2, 3, 1).numpy(), y.tolist()
        self.transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.x[index])), self.y[index]


def small_cnn() -> nn.Module:
    blocks: list[nn.Module] = []
    for n_in, n_out in ((3, 32), (32, 64), (64, 128)):
        blocks += [nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(n_out), nn.ReLU()]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(128 * 16, 128), nn.ReLU(), nn.Linear(128, 10))


def sgd(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def seconds_of_20_batches(loader: DataLoader) -> float:
    began = time.perf_counter()
    for k, _ in enumerate(loader):
        if k == 20:
            break
    return time.perf_counter() - began


def train_poutyne(train: DataLoader, valid: DataLoader, n_epochs: int) -> None:
    from poutyne import Callback, Model

    class Clock(Callback):
        def on_epoch_end(self, epoch_number: int, logs: dict) -> None:
            print(f"{logs['time']:.4f}", flush=True)

    network = small_cnn()
    model = Model(network, sgd(network), "cross_entropy", batch_metrics=["accuracy"])
    model.fit_generator(train, valid, epochs=n_epochs, callbacks=[Clock()], progress_options={"coloring": False})


def train_lightning(train: DataLoader, valid: DataLoader, n_epochs: int) -> None:
    import lightning
    from torch.nn import functional as F

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = small_cnn()

        def training_step(self, batch: Any, k: int) -> Tensor:
            loss = F.cross_entropy(output := self.network(batch[0]), batch[1])
            self.log("loss", loss, prog_bar=True)
            self.log("acc", (output.argmax(1) == batch[1]).float().mean(), prog_bar=True)
            return loss

        def validation_step(self, batch: Any, k: int) -> None:
            output = self.network(batch[0])
            self.log("val_loss", F.cross_entropy(output, batch[1]))
            self.log("val_acc", (output.argmax(1) == batch[1]).float().mean())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self)

        def on_train_epoch_start(self) -> None:
            self.began = time.perf_counter()

        def on_train_epoch_end(self) -> None:  # after validation
            print(f"\n{time.perf_counter() - self.began:.4f}", flush=True)

    lightning.Trainer(max_epochs=n_epochs, accelerator="auto", num_sanity_val_steps=0).fit(Module(), train, valid)


def main() -> None:
    name, n_train, n_epochs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    train = Images(n_train, 0, [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()])
    valid = Images(1280, 1, [])
    options = [{"num_workers": 0}, {"num_workers": 2, "persistent_workers": True}]
    speeds = [seconds_of_20_batches(DataLoader(train, 128, shuffle=True, **o)) for o in options]
    chosen: dict[str, Any] = options[0] if speeds[0] < speeds[1] else options[1]
    loaders = DataLoader(train, 128, shuffle=True, **chosen), DataLoader(valid, 128, **chosen)
    {"poutyne": train_poutyne, "lightning": train_lightning}[name](*loaders, n_epochs)


if __name__ == "__main__":
    main()
