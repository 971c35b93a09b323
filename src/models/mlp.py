import math
from collections.abc import Sequence

import gin
from torch import Tensor, nn


@gin.register(denylist=["input_shape", "n_classes"])
class MLP(nn.Module):
    """Dense layers with ReLU, one for each number in n_hidden, for inputs of any shape.

    x [B, *input_shape] -> logits [B, n_classes]. dropout: share of each hidden layer, in training.
    """

    def __init__(
        self, input_shape: tuple[int, ...], n_classes: int, n_hidden: Sequence[int] = (256, 256), dropout: float = 0.0
    ) -> None:
        super().__init__()
        n_in, layers = math.prod(input_shape), nn.Sequential(nn.Flatten())
        for n_out in n_hidden:
            layers.extend([nn.Linear(n_in, n_out), nn.ReLU(), nn.Dropout(dropout)])
            n_in = n_out
        self.layers = layers.append(nn.Linear(n_in, n_classes))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        return logits
