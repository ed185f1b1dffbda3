"""Find the layers of a network, and which of them are functions of which others alone."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from fisherfast.data.inputs import Samples
from fisherfast.model.hooks import Forward
from fisherfast.model.sites import HEAD, INPUT, JOINT, OUTPUT, Site

PASSIVE = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)
"""Modules that change only the shape in eval mode: "auto" leaves them out."""


def survey(model: nn.Module, batch: Samples) -> list[Site]:
    """List all sites of a model in execution order, with aliases and chains. Call inside
    `evaluation`.

    Two events with the same tensor (a container returns its last child's output) are one site. A
    second run with one sample less shows which tensors have one row per sample, and which only
    happened to have as many rows. Several heads add one more site, the joint "output", with each
    tensor once; a single head is the "output" itself. Cost: two forward passes.
    """
    per_sample = _events(model, batch[:-1]) if len(batch) > 1 else None
    sites: list[Site] = []
    seen: list[tuple[weakref.ref[Tensor], int, Site]] = []

    heads: dict[int, tuple[str, Site]] = {}  # by the site: a tensor returned twice is one head

    def consume(name: str, kind: str, module: nn.Module | None, output: Tensor) -> None:
        if per_sample is not None and name not in per_sample:
            return
        for reference, version, site in seen:
            if reference() is _original(output) and version == _version(output):
                site.also(name)
                break
        else:
            passive = isinstance(module, PASSIVE) and name != OUTPUT
            site = Site(name, kind, tuple(output.shape[1:]), passive=passive, module=module)
            sites.append(site)
            seen.append((weakref.ref(output), _version(output), site))
        if name.startswith(HEAD):
            heads.setdefault(id(site), (name, site))
            site.passive = False

    with Forward(model, consume) as forward:
        output = forward.run(batch.clone())
        del output
    names = tuple(name for name, _ in heads.values())
    if len(names) == 1:
        heads.popitem()[1][1].also(OUTPUT)
    elif names:
        width = sum(site.dim for _, site in heads.values())
        sites.append(Site(OUTPUT, JOINT, (width,), heads=names))
    return sites


def _events(model: nn.Module, batch: Samples) -> set[str]:
    """Names of all events of a run."""
    names: set[str] = set()
    with Forward(model, lambda name, kind, module, output: names.add(name)) as forward:
        forward.run(batch.clone())
    return names


CHAIN_SAMPLES = 8
"""Fewest samples that distinguish two activations; more also cover paths that few samples take."""

CHAIN_TOLERANCE = 1e-3
"""Relative difference below which two activations count as equal; the rounding of another batch
order is 1e-5."""


def chains(model: nn.Module, batch: Samples, sites: list[Site]) -> None:
    """Find which sites are a function of which other site alone, and fill `Site.descendants`.

    The model runs on *other* samples while the output of one site is replaced by its output for
    these samples. A later site whose output is unchanged depends on this site alone; after a skip
    connection it differs.
    """
    if len(batch) < 2:
        return
    other = batch.roll(1, 0)
    original = _record(model, batch, sites)
    for site in sites:
        try:
            start = batch if site.name == INPUT else other
            replay = _record(model, start, sites, replace=(site.name, original))
        except Exception:  # the network rejects replaced values: no chain is known
            continue
        past = False
        for later in sites:
            if past and later.name in replay and _same(replay[later.name], original[later.name]):
                site.descendants.add(later.name)
            past = past or later is site


def _record(
    model: nn.Module,
    x: Samples,
    sites: Sequence[Site],
    replace: tuple[str, Mapping[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Record the outputs of all sites, with one of them replaced by that of an earlier record."""
    by_event = {event: site for site in sites for event in site.names}
    outputs: dict[str, Tensor] = {}

    def consume(event: str, kind: str, module: nn.Module | None, output: Tensor) -> Tensor | None:
        site = by_event.get(event)
        if site is None or site.name in outputs:
            return None
        if replace is not None and site.name == replace[0] and event != INPUT:
            outputs[site.name] = replace[1][site.name]
            return outputs[site.name].clone()
        outputs[site.name] = output.detach().clone()
        return None

    with Forward(model, consume, sites) as forward:
        forward.run(x.clone())
    return outputs


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    a, b = a.double(), b.double()
    return bool((a - b).abs().max() <= CHAIN_TOLERANCE * b.abs().max().clamp_min(1e-30))


def _version(output: Tensor) -> int:
    """Return the count of in-place changes; inference tensors have none."""
    return -1 if output.is_inference() else output._version


def _original(output: Tensor) -> Tensor:
    """Return the tensor that a view only reshapes, or the tensor itself."""
    base = output._base
    return base if base is not None and base.numel() == output.numel() else output
