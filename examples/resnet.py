"""A residual network: branches are indented, and information is lost between the cuts."""

import torch
from torch import nn

import fisherfast as ff


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return (x + self.conv2(self.conv1(x).relu())).relu()


torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 4, 3), Block(), Block(), nn.Flatten(), nn.Linear(256, 1))
x = torch.randn(3000, 1, 10, 10)
print(ff.fisher_flow(model, ff.Pathwise(x, torch.ones_like(x) / 10), layers="cuts"))
