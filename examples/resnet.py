"""A residual network: branches are indented, and information is lost between the cuts."""

import torch
from torch import nn

import fisherfast as ff


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return (x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))).relu()


model = nn.Sequential(nn.Conv2d(1, 8, 3), Block(), Block(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(128, 1))
x = torch.randn(3000, 1, 20, 20)
print(ff.fisher_flow(model, ff.Pathwise(x, torch.ones_like(x) / 10)))
