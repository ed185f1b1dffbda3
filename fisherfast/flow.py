"""`fisher_flow` measures the Fisher information of every layer in one streaming pass,
`fisher_information` that of the data alone.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fisherfast.data import Data
from fisherfast.estimation.ridge import AUTO, RidgeSetting
from fisherfast.measurement.run import Measurement
from fisherfast.measurement.settings import MAX_FEATURES, MeasurementSettings, Settings
from fisherfast.model.sites import Layers
from fisherfast.model.unwrap import check_model, unwrapped
from fisherfast.parallel.ranks import ranks_of
from fisherfast.results.flow import FisherFlow
from fisherfast.results.layer import LayerFisher


def fisher_flow(
    model: nn.Module,
    data: Data,
    *,
    layers: Layers = "auto",
    max_features: int = MAX_FEATURES,
    probe: str | None = None,
    ridge: RidgeSetting = AUTO,
    output: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
    memory_budget: int | str | None = None,
    process_group: Any = None,
    settings: Settings | None = None,
) -> FisherFlow:
    r"""Measure the Fisher information about theta in the activations of every layer.

    For each layer this is :math:`J = D^T S^{-1} D` of its activations and a random lift of them,
    corrected for finite-sample bias, with a standard error and an honest lower bound. The model
    runs in eval mode without gradients; its parameters, mode and hooks and the random state are
    restored afterwards, also after an error.

    Args:
        model: any module that takes a batch [n, ...], or several inputs as the data hold them, by
            position (a tuple) or by name (a dict). For a compiled or distributed model the wrapped
            module is measured; a module of ``torch.jit.script`` is one layer, and layers inside
            ``torch.func.vmap`` are not seen. A model that calls ``torch.autograd`` itself (a force
            field) has no tangents: give pairs, a score or labels.
        data: samples: `Labelled`, `FiniteDifference`, `Pathwise`, `Score` or `Simulator`. Batches
            are copied to the device of the model, floating ones to its dtype; integers stay as they
            are. The layer "input" holds the floating entries side by side; of integers alone it is
            NaN, except with a score. For `Pathwise` the tangents pass through
            the model together with the samples, at the cost of 1 + P forward passes.
        layers: "auto" (every layer, without dropout, flatten and identity; an invertible affine map
            such as batch norm shares the row of the layer before), "cuts" (of the layers that every
            path from input to output passes the last of each stage), a name, a list of names, a
            regular expression searched for in the names, or a function (name, module or None) ->
            bool. Names are those of ``model.named_modules()``, with "#2" for a second call and
            "fc1/relu" for ``F.relu`` after fc1. "input" and "output" are always included. If the
            model returns a tuple, a list, a dict or an object with tensors (its logits, say), also
            nested, "output" is the joint output: all floating tensors with one row per sample, side
            by side. Each of them is also a head, "output[0]" or "output[mean]", and included in
            "auto". Integers, None and tensors without a row per sample are left out; if nothing
            remains there is no "output".
        max_features: number of features to use per layer. A layer with more activations than that
            uses all of them; with more than 4096 activations, or too few samples for them, it is
            compressed in 16 more passes over the data, if these can be read again (docs/theory.md,
            15).
        probe: None, or "network": also train two small networks per layer, each on half of the
            samples, and add their outputs to the features of the other half. After many strong
            non-linearities this closes most of the gap that the lift leaves if the score is known,
            about half of it with pairs or tangents, and hardly any with two independent conditions.
            It takes up to a minute per layer on two cores, reads the data twice, so they must
            repeat, and keeps up to 512 MB of activations (docs/training.md). Compressed layers get
            no probe.
        ridge: noise variance added to each feature, relative to its own variance. Directions that
            vary less than that lose all their information. "auto" adds the rounding error of the
            activations to them, which costs no information that they carry, and 1e-4 to lifted
            features; a number is added to all features.
        output: name of a head, such as "output[mean]", that a monitor and its rules read instead of
            the joint "output"; it is always measured. Kept in ``flow.settings``.
        seed: of the random lift. The global random state is neither used nor changed.
        progress: True shows the progress, with tqdm if that is installed, False does not; None
            does after two seconds of work if standard error is a terminal and CI is not set.
        memory_budget: memory that the measurement may allocate in addition to the model and the
            user's own data, in bytes or as "2 GB"; None for no bound. Batches are made as small as
            necessary, and those of a loader are split. The result depends on the budget by rounding
            only (except for a `Simulator`, which draws other samples in batches of another size).
        process_group: processes that share the work: None for this process alone, "world" for all
            ranks of `torch.distributed` (this process alone if it is not initialised), or a
            ProcessGroup. All of them make this call, with the same data or each with its own
            `Shard`, and all get the same result (docs/training.md, many processes).
        settings: a `Settings`: batch size, folds, growing dictionaries, maps.

    Returns:
        `FisherFlow`: J, stderr, lower, ... of each layer, float64 [P, P] in 1/theta^2.

    Raises:
        ValueError: NaN or infinite activations (names the layer and the batch), too few samples
            (says how many are needed), an empty source, an unknown layer (lists the nearest names)
            or one that never runs; an output that the model does not have (lists its outputs); a
            memory_budget too small for one sample (says how much is needed); data that do not
            repeat, with a probe or grow.
        TypeError: complex data, or integers that no layer of the model turns into numbers.
        RuntimeError: another rank of the group failed (says which, and what it raised), or did not
            answer within the timeout of the process group.

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
        check_model(model)
        asked = MeasurementSettings.of(
            data,
            settings,
            max_features=max_features,
            probe=probe,
            ridge=ridge,
            output=output,
            seed=seed,
            memory_budget=memory_budget,
        )
        return Measurement(unwrapped(model), data, layers, asked, ranks=ranks).run(progress)


def fisher_information(
    data: Data,
    *,
    max_features: int = MAX_FEATURES,
    probe: str | None = None,
    ridge: RidgeSetting = AUTO,
    seed: int = 0,
    progress: bool | None = None,
    memory_budget: int | str | None = None,
    process_group: Any = None,
    settings: Settings | None = None,
) -> LayerFisher:
    """Measure the Fisher information about theta in the data themselves, without a model.

    Arguments, errors and cost are those of `fisher_flow`. Several inputs are measured side by side,
    as far as they are floating.

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
        asked = MeasurementSettings.of(
            data,
            settings,
            max_features=max_features,
            probe=probe,
            ridge=ridge,
            seed=seed,
            memory_budget=memory_budget,
        )
        if asked.maps:
            raise ValueError(
                f"maps must be False for fisher_information, got {asked.maps}: it returns the input"
                " alone; use fisher_flow(torch.nn.Identity(), ...).map('input')"
            )
        return Measurement(None, data, "auto", asked, ranks=ranks).run(progress).layers[0]
