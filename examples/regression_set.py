"""A regression data set (x, theta): where along theta does the network lose information?"""

import torch

import fisherfast as ff

torch.manual_seed(0)
theta = 2 * torch.rand(20_000) - 1
x = torch.sin(3 * theta)[:, None] + torch.randn(20_000, 16)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
flow = ff.fisher_flow(model, ff.Labelled(x, theta))
print(flow)
print(flow["output"].profile.crlb)
flow.plot_profile(["input", "output"], errors=(model, x, theta)).savefig("profile.png")
