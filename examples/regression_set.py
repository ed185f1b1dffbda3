"""A regression data set (x, theta): where along theta does the network lose information?"""

import torch

import fisherfast as ff

torch.manual_seed(0)
theta = 2 * torch.rand(20_000) - 1
x = torch.sin(1.2 * theta)[:, None] + torch.randn(20_000, 16)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
optimizer = torch.optim.Adam(model.parameters(), 0.01)
for batch in torch.randperm(20_000).split(200):
    loss = (model(x[batch])[:, 0] - theta[batch]).square().mean()
    optimizer.zero_grad(), loss.backward(), optimizer.step()
flow = ff.fisher_flow(model, ff.Labelled(x, theta))
print(flow)
flow.plot_profile(["input", "output"], errors=(model, x, theta)).savefig("profile.png")
