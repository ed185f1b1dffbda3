"""The Fisher matrix of a network's parameters: one function for every structure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from torch import nn

from fisherfast._fields import AtLeast, check_together, inside, read_fields, wrong
from fisherfast._validation import check_seed, check_whole
from fisherfast.model.default_device import on_host
from fisherfast.model.unwrap import unwrapped
from fisherfast.parameters.backward.batches import Data
from fisherfast.parameters.backward.columns import FisherType, Source
from fisherfast.parameters.checks import check_choice, check_options
from fisherfast.parameters.layout import ParameterLayout, Selection
from fisherfast.parameters.likelihood import Likelihood
from fisherfast.parameters.likelihoods import as_likelihood
from fisherfast.parameters.structures.base import ParameterFisher
from fisherfast.parameters.structures.block import BlockAccumulator, FullAccumulator
from fisherfast.parameters.structures.diagonal import DiagonalAccumulator
from fisherfast.parameters.structures.gram import GramAccumulator
from fisherfast.parameters.structures.kfac import KroneckerAccumulator
from fisherfast.parameters.structures.lowrank import LowRankAccumulator
from fisherfast.parameters.structures.streamed import StreamedAccumulator

Structure = Literal["diag", "block", "kfac", "full", "gram", "lowrank", "streamed"]

ACCUMULATORS: dict[str, Any] = {
    accumulator.kind.structure: accumulator
    for accumulator in (
        DiagonalAccumulator,
        BlockAccumulator,
        FullAccumulator,
        GramAccumulator,
        KroneckerAccumulator,
        LowRankAccumulator,
        StreamedAccumulator,
    )
}
"""By name: classes with `kind`, the structure that they make; `add`, which takes a batch; and
`means`, which gives the structure's own fields."""

RESULTS: dict[str, type[ParameterFisher]] = {
    name: made.kind for name, made in ACCUMULATORS.items() if name != "streamed"
}
"""Structures that can be stored."""

FISHER_TYPES = get_args(FisherType)

HEADER = {
    "structure": str,
    "layout": object,
    "samples": Annotated[int, AtLeast(1)],
    "fisher_type": FisherType,
}
"""Fields of the state of every structure."""


def fisher(
    model: nn.Module,
    likelihood: Likelihood | str,
    data: Data,
    *,
    structure: Structure = "diag",
    fisher_type: FisherType = "exact",
    samples: int = 1,
    parameters: Selection = None,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool | None = None,
    **settings: Any,
) -> ParameterFisher:
    r"""The Fisher matrix of the parameters w of p(y | x, w), averaged over the inputs of the data.

    .. math::
        F = \frac{1}{n} \sum_i \mathbb{E}_{y \sim p(y | x_i, w)}\left[ s\, s^T \right], \qquad
        s = \frac{\partial \log p(y | x_i, w)}{\partial w}

    The gradients are those of single samples, whatever the batch size: the square of a batch's mean
    gradient is another matrix, near zero at a trained network.

    Args:
        model: f(x, w), in evaluation mode, every sample by itself: [n, ...] to outputs [n, ...].
        likelihood: p(y | f): "gaussian" (of variance 1), "categorical", "bernoulli", "poisson" (f
            the logarithm of the rate), an instance of their classes, or your own `Likelihood`.
        data: inputs x [n, ...], a pair (x, y), a Dataset or DataLoader of x or (x, y), or an
            iterable of batches, read once. Several inputs of the model are a dict, or a tuple
            inside a pair, ((x1, x2), y). Labels are used by "empirical" only. Floating inputs are
            converted to the dtype and device of the model.
        structure: what is kept of F: "diag", "block" (one dense block per layer), "kfac" (Kronecker
            factors per layer), "full", "gram" (all of it, through the inner products of samples),
            "lowrank" (the largest eigenvalues) or "streamed" (nothing: products read the data).
        fisher_type: "exact" sums the expectation over the outputs, "mc" draws labels from the
            network, "empirical" takes the labels of the data: the second moment of the training
            gradients, which is not the Fisher matrix (Kunstner et al. 2019).
        samples: labels drawn for each input, for "mc" only; the error falls as 1 / sqrt(samples).
        parameters: which are measured: None for all that require grad, a regular expression, names,
            or a function of the name.
        batch_size: samples per batch, of tensors and Datasets. It changes memory, not the result.
        seed: of the labels drawn, in [-2^63, 2^63); the global random state is not touched.
        progress: True shows the progress, with tqdm if that is installed, False does not; None
            does after two seconds of work if standard error is a terminal and CI is not set.
        **settings: further options of the structure, see its class.

    Returns:
        The matrix in the structure asked for, float64, in nats and the unit 1 / w^2: ``F @ v``,
        ``solve``, ``trace``, ``diag``, ``eigenvalues``, ``logdet``; its analyses ``spectrum``,
        ``effective_dimension``, ``importance``. It keeps a reference to the model and the data for
        analyses that read them again; ``F.released()`` does not.

    Raises:
        TypeError: an argument of a wrong kind, a keyword that the structure does not take, a model
            that does not return one tensor.
        ValueError: an unknown structure or fisher_type, no data, labels missing or out of range,
            outputs that are not finite, active dropout, batch norm that uses its batch, nothing to
            measure, parameters that do not require grad.

    Cost: one forward pass, and one backward pass per column: N outputs of a sample (one less for
    `Categorical`) with "exact", `samples` with "mc", one with "empirical". A backward pass does not
    compute the weights' gradients; structures add their own cost. Layers without a rule (tied
    weights, attention's own matrices) take per-sample gradients, one more pass per column.

    References: Amari (1998), Neural Comput. 10, 251; Kunstner, Balles and Hennig (2019),
    "Limitations of the empirical Fisher approximation for natural gradient descent", NeurIPS;
    Martens (2020), "New insights and perspectives on the natural gradient method", JMLR 21, 146.

    Example:
        >>> import torch, fisherfast as ff
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [3.0, 1.0]])
        >>> F = ff.parameters.fisher(model, ff.parameters.Gaussian(variance=0.25), x)
        >>> F
        <Fisher matrix (diag): 2 parameters, 2 samples>
        >>> F.diag()  # the mean of x^2 / variance
        tensor([20.,  2.], dtype=torch.float64)
    """
    check_choice("structure", structure, ACCUMULATORS)
    accumulate = ACCUMULATORS[structure]
    check_options(accumulate, settings, structure)
    check_choice("fisher_type", fisher_type, FISHER_TYPES)
    likelihood = as_likelihood(likelihood)
    check_whole("samples", samples, least=1)
    if fisher_type != "mc" and samples != 1:
        raise ValueError(
            f"samples must be 1 for fisher_type {fisher_type!r}, which draws no labels, got"
            f' {samples}; draw them with fisher_type="mc"'
        )
    check_whole("batch_size", batch_size, least=1)
    check_seed(seed)
    model = unwrapped(model)
    layout = ParameterLayout.of(model, parameters)
    source = Source(
        model, likelihood, data, layout, fisher_type, samples, batch_size, seed, progress
    )
    sums = accumulate(layout, **settings)
    seen = source.read(sums.add)
    with on_host():
        matrix = sums.kind(layout, seen, fisher_type, *sums.means(seen))
    matrix._source = source
    return matrix


def from_state_dict(state: Mapping[str, Any]) -> ParameterFisher:
    """The matrix whose ``state_dict()`` this is; it keeps no network and no data.

    Raises:
        ValueError: no state of a Fisher matrix, or a damaged one.

    Example:
        >>> import torch, fisherfast as ff
        >>> model = torch.nn.Linear(2, 1)
        >>> F = ff.parameters.fisher(model, ff.parameters.Gaussian(), torch.ones(4, 2))
        >>> torch.equal(ff.parameters.from_state_dict(F.state_dict()).diag(), F.diag())
        True
    """
    if not isinstance(state, Mapping):
        raise wrong("state", "be a mapping", state)
    check_choice("state.structure", state.get("structure"), RESULTS)
    kind = RESULTS[state["structure"]]
    own = {name: value for name, value in state.items() if name not in HEADER}
    values = read_fields(HEADER, {n: v for n, v in state.items() if n in HEADER}, "state")
    layout = ParameterLayout.from_state_dict(values["layout"])
    made = kind(layout, values["samples"], values["fisher_type"], **kind._from_state(layout, own))
    with inside("state"):
        check_together(made)
    return made
