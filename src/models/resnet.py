import gin
from torch import nn


@gin.register(denylist=["input_shape", "n_classes"])
def ResNet18(input_shape: tuple[int, ...], n_classes: int) -> nn.Module:
    """torchvision's ResNet-18, but for small images: it begins with a 3x3 convolution of stride 1 and no max-pool.

    x [B, C, H, W], of any size -> logits [B, n_classes].
    Source: He et al., Deep Residual Learning for Image Recognition (CVPR 2016), table 1, with the first layer of its
    section 4.2 (CIFAR-10).
    """
    from torchvision.models import resnet18

    network: nn.Module = resnet18(num_classes=n_classes)
    network.conv1 = nn.Conv2d(input_shape[0], 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network
