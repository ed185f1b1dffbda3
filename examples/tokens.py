"""A transformer that reads tokens: integers go to the model as they are."""

import torch

import fisherfast as ff

torch.manual_seed(0)
theta = torch.rand(8000)  # the probability of a one
tokens = (torch.rand(8000, 12) < theta[:, None]).long()
block = torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
model = torch.nn.Sequential(torch.nn.Embedding(2, 16), block, torch.nn.Flatten(), torch.nn.Linear(192, 1))
print(ff.fisher_flow(model, ff.Labelled(tokens, theta)))
