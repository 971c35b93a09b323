from collections.abc import Sequence

import gin
from torch import Tensor, nn


@gin.register(denylist=["input_shape", "n_classes"])
class SimpleCNN(nn.Module):
    """A small CNN: for each number in n_filters a block (3x3 convolution, 2x2 max-pool, batch norm,
    ReLU), then a dense layer of n_dense units and one for the classes.

    x [B, C, H, W], of any size -> logits [B, n_classes]. Blocks pool as long as both sides stay at
    2 pixels or more. dropout: share of the dense layer, in training.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        n_classes: int,
        n_filters: Sequence[int] = (32, 64, 128),
        n_dense: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        n_in, height, width = input_shape
        layers: list[nn.Module] = []
        for n_out in n_filters:
            layers.append(nn.Conv2d(n_in, n_out, 3, padding=1, bias=False))  # batch norm has one
            if min(height, width) >= 4:
                layers.append(nn.MaxPool2d(2))  # before the rest, which is then a quarter the work
                height, width = height // 2, width // 2
            layers += [nn.BatchNorm2d(n_out), nn.ReLU()]
            n_in = n_out
        self.features = nn.Sequential(*layers)
        dense = nn.Linear(n_in * height * width, n_dense)
        self.classifier = nn.Sequential(
            nn.Flatten(), dense, nn.ReLU(), nn.Dropout(dropout), nn.Linear(n_dense, n_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x))
        return logits
