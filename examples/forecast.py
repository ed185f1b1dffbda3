"""What two sensors together will know about a position, with a prior, before they are built."""

import torch

import fisherfast as ff

x, sensor = torch.randn(20_000, 32), torch.nn.Linear(32, 8)
dx = torch.stack([torch.linspace(0, 1, 32), torch.linspace(1, 0, 32)]).expand(20_000, 2, 32)
a = ff.fisher_flow(sensor, ff.Pathwise(x, dx, names=["x", "y"]))
b = ff.fisher_flow(sensor, ff.Pathwise(x.flip(0), dx / 2, names=["x", "y"]))
both = ff.combine(a, b)
print(both["output"].with_prior([1.0, 4.0]).crlb, both["output"].marginal("x"))
both.plot_ellipses(["input", "output"]).savefig("ellipses.png")
