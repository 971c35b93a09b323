import gin
from torch import Tensor, nn
from torch.nn import functional as F

from src.config import Refused


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm, added to the input: [B, n_in, H, W] ->
    [B, n_out, H / stride, W / stride], rounded up. The input goes through a 1x1 convolution if its
    shape is another.
    """

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*_conv_norm(n_in, n_out, 3, stride), nn.ReLU(), *_conv_norm(n_out, n_out, 3, 1))
        is_same = n_in == n_out and stride == 1
        self.shortcut = nn.Identity() if is_same else _conv_norm(n_in, n_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layers(x) + self.shortcut(x))


def _conv_norm(n_in: int, n_out: int, size: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(n_in, n_out, size, stride=stride, padding=size // 2, bias=False)  # batch norm has one
    return nn.Sequential(conv, nn.BatchNorm2d(n_out))


@gin.register(denylist=["input_shape", "n_classes"])
class ResNet18(nn.Module):
    """ResNet-18 for small images: it begins with a 3x3 convolution of stride 1 and no max-pool.

    x [B, C, H, W], of any size -> logits [B, n_classes]. width: filters of the first of the four
    stages; each later one has twice as many and half the height and width.
    Source: He et al., Deep Residual Learning for Image Recognition (CVPR 2016), table 1, with the
    first layer of its section 4.2 (CIFAR-10). Raises Refused if the data are no images.
    """

    def __init__(self, input_shape: tuple[int, ...], n_classes: int, width: int = 64) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise Refused(f"ResNet18 takes images [C, H, W], not data of shape {input_shape}")
        self.stem = nn.Sequential(*_conv_norm(input_shape[0], width, 3, 1), nn.ReLU())
        self.stages = nn.Sequential(
            nn.Sequential(Block(width, width, 1), Block(width, width, 1)),
            nn.Sequential(Block(width, 2 * width, 2), Block(2 * width, 2 * width, 1)),
            nn.Sequential(Block(2 * width, 4 * width, 2), Block(4 * width, 4 * width, 1)),
            nn.Sequential(Block(4 * width, 8 * width, 2), Block(8 * width, 8 * width, 1)),
        )
        self.classifier = nn.Linear(8 * width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.stages(self.stem(x)).mean((2, 3)))
        return logits
