"""A transformer that reads tokens: integers go to the model as they are."""

import torch
from torch import nn

import fisherfast as ff

torch.manual_seed(0)
theta = torch.rand(6000) / 2 + 0.25  # the probability of a one
tokens = (torch.rand(6000, 8) < theta[:, None]).long()
block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
model = nn.Sequential(nn.Embedding(2, 8), block, nn.Flatten(), nn.Linear(64, 1))
print(ff.fisher_flow(model, ff.Labelled(tokens, theta, bins=4)))
