"""The models. A new one: a new file here with what takes input_shape and n_classes, and a line
below. Those of torchvision are registered by name when a config asks for one.
"""

from src.models.mlp import MLP as MLP
from src.models.resnet import ResNet18 as ResNet18
from src.models.simple_cnn import SimpleCNN as SimpleCNN
