"""Data in every form, and a Fisher matrix that does not depend on how they are batched."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from fisherfast.parameters import Categorical, fisher

N = 60


def network(dtype=torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 3, padding=1), nn.Tanh(), nn.Flatten(),
        nn.Linear(12, 3),
    ).to(dtype)  # fmt: skip


def inputs(n: int = N, dtype=torch.float64) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)


def labels() -> Tensor:
    return torch.randint(3, (N,), generator=torch.Generator().manual_seed(2))


class Numbers(Dataset):
    """A Dataset of arrays and plain numbers."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int):
        return self.x[index].numpy(), int(self.y[index])


class Stream(IterableDataset):
    """One sample after the other, of unknown number."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __iter__(self):
        return zip(self.x, self.y, strict=True)


SOURCES = {
    "tensors": lambda x, y: (x, y),
    "Dataset of numbers": Numbers,
    "IterableDataset": Stream,
    "DataLoader": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=9),
    "list": lambda x, y: [(x[:5], y[:5]), [x[5:], y[5:]]],
    "generator": lambda x, y: ((x[i : i + 8], y[i : i + 8]) for i in range(0, N, 8)),
    "with empty batches": lambda x, y: [(x[:0], y[:0]), (x, y), (x[:0], y[:0])],
    "strided": lambda x, y: (x.repeat_interleave(2, 1)[:, ::2], y.repeat_interleave(2)[::2]),
}


SOURCES_OF_INPUTS = {
    "array": lambda x: x.numpy(),
    "tuple of one": lambda x: (x,),
    "pair without labels": lambda x: (x, None),
    "pair with labels of something else": lambda x: (x, torch.full((N, 7), float("nan"))),
    "Dataset": TensorDataset,
    "DataLoader of tensors": lambda x: DataLoader(list(x), batch_size=9),
    "list of tuples": lambda x: [(x[:5],), (x[5:],)],
    "iterator": lambda x: iter([x[:5], x[5:]]),
}


@pytest.mark.parametrize(
    ("source", "fisher_type"),
    [*((s, "empirical") for s in SOURCES), *((s, "exact") for s in SOURCES_OF_INPUTS)],
)
def test_sources(source, fisher_type):
    """Catches labels that go to other samples, that are asked for or looked at where none are used,
    and batches that are left out."""
    model, x = network(), inputs()
    y = labels()
    pairs = fisher_type == "empirical"
    data = SOURCES[source](x, y) if pairs else SOURCES_OF_INPUTS[source](x)
    expected = fisher(model, Categorical(), (x, y), fisher_type=fisher_type).diag()
    found = fisher(model, Categorical(), data, fisher_type=fisher_type, batch_size=7)
    assert found.samples == N
    torch.testing.assert_close(found.diag(), expected, rtol=1e-12, atol=1e-14)


def test_inputs_take_the_dtype_of_the_model():
    """Catches arrays of float64 that a float32 network refuses, and tokens that become floats."""
    model, x = network(torch.float32), inputs()
    expected = fisher(model, Categorical(), x.float()).diag()
    assert torch.equal(fisher(model, Categorical(), x.numpy()).diag(), expected)
    tokens = torch.randint(0, 5, (N, 4), generator=torch.Generator().manual_seed(0))
    reader = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(12, 3))
    assert fisher(reader, Categorical(), tokens.numpy()).samples == N


X, Y = inputs(), torch.zeros(N, dtype=torch.long)
WRONG = [
    (X[:0], ValueError, "data must hold at least one sample, got none"),
    (iter(()), ValueError, "data must hold at least one sample, got none"),
    (TensorDataset(X[:0], Y[:0]), ValueError, "data must hold at least one sample, got none"),
    ([X, X], TypeError, "data must be a tuple for a pair (x, y), got a list of two, which may be"),
    (X, ValueError, "data must hold labels, got inputs alone: pass (x, y)"),
    (TensorDataset(X), ValueError, "data must hold labels, got inputs alone: pass (x, y)"),
    ((X, Y[:-1]), ValueError, "labels must be as many as inputs (60), got 59"),
    ((X, Y, Y), ValueError, "data must be a pair (x, y), got 3 entries"),
    ([(X, Y, Y)], ValueError, "data must be batches of x or (x, y), got one of 3 entries"),
    ((X, list(range(N))), TypeError, "labels must be tensors or arrays, got list"),
    ((X, torch.tensor(1)), ValueError, "labels must have shape [n, ...], got a single number"),
    ([{"x": X, "y": Y}], TypeError, "data must be tensors or arrays, got dict"),
    ({"x": X}, TypeError, "data must be a tensor, a pair (x, y), a Dataset, a DataLoader or"),
    (None, TypeError, "data must be a tensor, a pair (x, y), a Dataset, a DataLoader or"),
    (torch.tensor(1.0), ValueError, "data must have shape [n, ...], got a single number"),
    ([1.0, 2.0], TypeError, "data must be tensors or arrays, got float"),
    (X.to_sparse(), TypeError, "data must be dense, got torch.sparse_coo"),
    ((np.array(["a"]), Y[:1]), TypeError, "data must hold numbers, got an array of <U1"),
]


@pytest.mark.parametrize(("data", "error", "text"), WRONG)
def test_wrong_data(data, error, text):
    """Catches an empty mean (NaN), labels that are cut or repeated, and errors about something
    else."""
    with pytest.raises(error, match=f"^{re.escape(text)}"):
        fisher(network(), Categorical(), data, fisher_type="empirical")
