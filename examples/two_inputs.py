"""A network that takes an image and an exposure time: x is the tuple that model(*x) takes."""

import torch

import fisherfast as ff

torch.manual_seed(0)
image, exposure = torch.randn(5000, 64), 1 + torch.rand(5000, 1)
model = torch.nn.Bilinear(64, 1, 16)  # called as model(image, exposure)
signal = exposure * torch.linspace(0, 0.2, 64)  # the image grows with theta and the exposure
print(ff.fisher_flow(model, ff.Pathwise((image, exposure), (signal, None))))
