"""The networks of the published experiments, and a chain that loses no information."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn

from fisherfast._validation import check_positive, check_seed, check_whole
from fisherfast.problems.problem import STREAM_PARAMETERS, seeded_generator


def mlp(
    widths: Sequence[int],
    activation: Callable[[], nn.Module] = nn.ReLU,
    *,
    flatten: bool = False,
    seed: int | None = None,
) -> nn.Sequential:
    """Make a multilayer perceptron with layers named fc1, relu1, fc2, relu2, ..., fcL.

    Args:
        widths: units of every layer, input and output included; at least two.
        activation: builds one activation module; its class name in lower case names the layers.
        flatten: start with a layer "flatten", for inputs such as images [n, H, W].
        seed: of the weights, without changing the global random state; None draws them from that
            state, as PyTorch does.

    Returns:
        The network, in training mode, on the CPU.

    Raises:
        ValueError: if there are fewer than two widths, or one is not positive.

    Example:
        >>> import torch
        >>> from fisherfast.problems import mlp
        >>> first, second = mlp([4, 3, 1], seed=0), mlp([4, 3, 1], seed=0)
        >>> torch.equal(first.fc1.weight, second.fc1.weight)
        True
        >>> [name for name, _ in first.named_children()]
        ['fc1', 'relu1', 'fc2']
    """
    if len(widths) < 2:
        raise ValueError(f"widths must hold at least 2 numbers, got {list(widths)}")
    sizes = [check_whole("widths", width, least=1) for width in widths]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if flatten:
        layers["flatten"] = nn.Flatten()
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(check_seed(seed))
        for index, (inputs, outputs) in enumerate(pairwise(sizes), start=1):
            if index > 1:
                module = activation()
                layers[f"{type(module).__name__.lower()}{index - 1}"] = module
            layers[f"fc{index}"] = nn.Linear(inputs, outputs)
    return nn.Sequential(layers)


def imaging_network(*, seed: int | None = None) -> nn.Sequential:
    """Make 432-800-100-25-5-1 with ReLU, for images [n, 18, 24] (Weimar et al. 2025)."""
    return mlp([432, 800, 100, 25, 5, 1], flatten=True, seed=seed)


def gaussian_network(*, seed: int | None = None) -> nn.Sequential:
    """Make 256-150-100-50-25-1 with ReLU, for samples [n, 256] (Weimar et al. 2025)."""
    return mlp([256, 150, 100, 50, 25, 1], seed=seed)


def lognormal_network(*, seed: int | None = None) -> nn.Sequential:
    """Make 10-150-100-50-25-1 with ReLU, for samples [n, 10] (Weimar et al. 2025)."""
    return mlp([10, 150, 100, 50, 25, 1], seed=seed)


def invertible_chain(
    dim: int, *, depth: int = 6, slope: float = 0.3, seed: int = 0
) -> nn.Sequential:
    """Make square orthogonal layers with random biases, each followed by a leaky ReLU.

    Every layer is invertible, so the Fisher information of the input is the same at every depth;
    the *linear* Fisher information falls with depth.

    Args:
        dim: d, units of every layer.
        depth: pairs of linear layer and activation, named fc1, leakyrelu1, fc2, ...
        slope: of the leaky ReLU below zero, positive.
        seed: of weights and biases; the global random state does not change.

    Returns:
        The chain, [n, d] -> [n, d].

    Raises:
        ValueError: if dim, depth or slope is not positive.

    Example:
        >>> import torch
        >>> from fisherfast.problems import invertible_chain
        >>> invertible_chain(16, depth=2)(torch.zeros(3, 16)).shape
        torch.Size([3, 16])
    """
    check_whole("dim", dim, least=1)
    check_positive("slope", slope)
    generator = seeded_generator(seed, STREAM_PARAMETERS)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index in range(1, check_whole("depth", depth, least=1) + 1):
        linear = nn.utils.skip_init(nn.Linear, dim, dim)
        random = torch.randn(dim, dim + 1, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            linear.weight.copy_(torch.linalg.qr(random[:, :dim])[0])
            linear.bias.copy_(random[:, dim])
        layers[f"fc{index}"] = linear
        layers[f"leakyrelu{index}"] = nn.LeakyReLU(slope)
    return nn.Sequential(layers)
