"""`fisher_flow`: the Fisher information of every layer in one streaming pass; `fisher_information`:
that of the data alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fisherfast.data import Data
from fisherfast.estimation.ridge import AUTO, RidgeSetting
from fisherfast.measurement.memory import check_budget
from fisherfast.measurement.run import Measurement
from fisherfast.measurement.settings import (
    BATCH_SIZE,
    FOLDS,
    MAX_FEATURES,
    check_output,
    check_passes,
    check_settings,
)
from fisherfast.model.sites import Layers
from fisherfast.model.unwrap import unwrapped
from fisherfast.parallel.ranks import ranks_of
from fisherfast.results.flow import FisherFlow
from fisherfast.results.layer import LayerFisher

__all__ = ["fisher_flow", "fisher_information"]


def fisher_flow(
    model: nn.Module,
    data: Data,
    *,
    layers: Layers = "auto",
    max_features: int = MAX_FEATURES,
    probe: str | None = None,
    output: str | None = None,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    progress: bool = False,
    ridge: RidgeSetting = AUTO,
    folds: int = FOLDS,
    grow: bool = False,
    maps: bool | Sequence[str] = False,
    memory_budget: int | str | None = None,
    process_group: Any = None,
) -> FisherFlow:
    r"""Fisher information about theta in the activations of every layer.

    For each layer, :math:`J = D^T S^{-1} D` of its activations and a random lift of them, free of
    finite-sample bias, with standard error and an honest lower bound. The model runs in eval mode
    without gradients; parameters, mode, hooks and random state are afterwards as they were, also
    after an error.

    Args:
        model: any module that maps a batch [n, ...] to anything; of a compiled or distributed one
            the module inside is measured.
        data: samples at theta: `FiniteDifference`, `Pathwise`, `Score` or `Simulator`. Batches are
            copied to the device and dtype of the model. For `Pathwise` the tangents go through the
            model beside the samples, at the cost of 1 + P forward passes.
        layers: "auto" (every layer, without dropout, flatten and identity), a name, a list of
            names, a regular expression searched for in the names, or a function (name, module or
            None) -> bool. Names are those of ``model.named_modules()``, with "#2" for a second call
            and "fc1/relu" for ``F.relu`` after fc1. "input" and "output" are always there. Of a
            model that returns a tuple, a list or a dict, also nested, "output" is the joint one:
            all floating tensors with one row per sample, side by side. Each of them is a head,
            "output[0]" or "output[mean]", in "auto" too. Integers, None and tensors without a row
            per sample are left out; if nothing remains there is no "output".
        max_features: features per layer aimed at. A layer wider than that uses all its activations;
            with more than 4096 of them, or too few samples for so many, it is compressed in 16 more
            passes over data that can be read again (docs/theory.md, 15).
        probe: None, or "network": also train two small networks per layer, each on half of the
            samples, and add their outputs to the features of the other half. Closes most of the gap
            that the lift leaves behind many strong non-linearities where the score is known, about
            half of it by pairs or tangents, hardly any by two independent conditions, for up to a
            minute per layer on two cores. Reads the data twice, so they must repeat, and keeps up
            to 512 MB of activations (docs/training.md). Not for layers that are compressed.
        output: name of a head, such as "output[mean]", that a monitor and its rules read instead of
            the joint "output"; it is measured whatever the layers. Kept in ``flow.settings``.
        batch_size: samples per batch, for data that are not batched already.
        seed: of the random lift. The global random state is neither used nor changed.
        progress: show a progress bar (needs tqdm).
        ridge: noise variance added to each feature, relative to its own. It takes all information
            from directions that vary less than that. "auto" adds the rounding of the activations to
            them, which takes nothing that they carry, and 1e-4 to lifted features; a number is
            added to all.
        folds: number of folds, even, at least 4 (6 for paired conditions and tangents).
        grow: begin with 64 lifted features and double their number, in another pass over the data,
            only for layers whose curve still rises at its end, up to max_features. Each pass
            computes the new features alone. For data that repeat: tensors, arrays, Datasets,
            loaders that do not shuffle.
        maps: also measure the information of the channels at each position of layers [C, H, W], of
            all or of those in a list of names, see `FisherFlow.map`.
        memory_budget: what the measurement may allocate beside the model and the user's own data,
            in bytes or as "2 GB"; None for no bound. Batches are made as small as it takes, those
            of a loader are split. The result depends on it by rounding alone (but for a
            `Simulator`, which draws other samples in batches of another size).
        process_group: processes that share the work: None for this one alone, "world" for all ranks
            of `torch.distributed` (this one alone where it is not initialised), or a ProcessGroup.
            All of them make this call, with the same data or each with its own `Shard`, and all get
            the same result (docs/training.md, many processes).

    Returns:
        `FisherFlow`: J, stderr, lower, ... of each layer, float64 [P, P] in 1/theta^2.

    Raises:
        ValueError: NaN or infinite activations (names the layer and the batch), too few samples
            (says how many are needed), an empty source, an unknown layer (names the nearest) or one
            that never runs; an output that the model does not have (lists those that it has); a
            memory_budget too small for one sample (says what is needed); data that do not repeat,
            for a probe or to grow.
        TypeError: integer or complex data.
        RuntimeError: another rank of the group has failed (names it, and what it raised), or does
            not come within the timeout of the process group.

    Warns:
        FisherWarning: the finite step is too wide for a derivative: dtheta sqrt(J) / 2 > 0.3; the
            mean of a score is more than 5 standard errors from zero.

    Cost: one forward pass over the data (1 + P with tangents) plus n k^2 operations and 16 k^2
        bytes per layer; memory does not grow with the number of samples.

    Reference: Weimar et al., Phys. Rev. X 15, 031072 (2025); corrections derived in docs/theory.md.

    Example:
        >>> import torch, fisherfast as ff
        >>> layers = torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1)
        >>> model = torch.nn.Sequential(*layers)
        >>> x = torch.randn(2, 5000, 8)
        >>> flow = ff.fisher_flow(model, ff.FiniteDifference(x[0] - 0.05, x[1] + 0.05, dtheta=0.1))
        >>> flow.names
        ['input', '0', '1', 'output']
    """
    with ranks_of(process_group) as ranks:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        settings = check_settings(data, max_features, probe, batch_size, seed, ridge, folds)
        settings |= check_passes(data, grow, maps) | check_budget(memory_budget)
        settings |= check_output(output)
        measurement = Measurement(unwrapped(model), data, layers, settings, ranks=ranks)
        return measurement.run(progress)


def fisher_information(
    data: Data,
    *,
    max_features: int = MAX_FEATURES,
    probe: str | None = None,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    progress: bool = False,
    ridge: RidgeSetting = AUTO,
    folds: int = FOLDS,
    grow: bool = False,
    memory_budget: int | str | None = None,
    process_group: Any = None,
) -> LayerFisher:
    """Fisher information about theta in the data themselves, without a model.

    Arguments, errors and cost as for `fisher_flow`.

    Returns:
        `LayerFisher` named "input": J, stderr, lower, ... float64 [P, P] in 1/theta^2.

    Example:
        >>> import torch, fisherfast as ff
        >>> x = torch.randn(2, 20000, 4)
        >>> info = ff.fisher_information(ff.FiniteDifference(x[0] - 0.1, x[1] + 0.1, dtheta=0.2))
        >>> abs(info.value - 4) < 0.8
        True
    """
    with ranks_of(process_group) as ranks:
        settings = check_settings(data, max_features, probe, batch_size, seed, ridge, folds)
        settings |= check_passes(data, grow, maps=False) | check_budget(memory_budget)
        return Measurement(None, data, "auto", settings, ranks=ranks).run(progress).layers[0]
