"""Models of a user's own, which the command line may be pointed at."""

import torch
from torch import nn


class Bessel(nn.Module):
    """Two linear layers with a function between them that ONNX does not have."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(64, 16), nn.Linear(16, 10)

    def forward(self, x):
        return self.last(torch.special.bessel_j0(self.first(x.flatten(1))))


def bessel():
    return Bessel()


def nothing_to_shrink():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def no_module():
    return "a network"
