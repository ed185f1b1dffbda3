"""Find the layers of a network, and join those that hold the same information."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor, nn

from fisherfast.data.inputs import Samples
from fisherfast.model.hooks import Forward
from fisherfast.model.sites import HEAD, JOINT, OUTPUT, Site

PASSIVE = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)
"""Modules that change only the shape in eval mode: "auto" leaves them out."""


def survey(model: nn.Module, batch: Samples) -> list[Site]:
    """List all sites of a model in execution order, with aliases. Call inside `evaluation`.

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
            seen.append((weakref.ref(_original(output)), _version(output), site))
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


def merged(sites: Sequence[Site], apart: Callable[[Site, Site], bool]) -> list[Site]:
    """Join each site with the one of which it is an invertible affine map (see `follow`): it
    becomes a second name of that one, which is measured for both.

    Args:
        sites: all sites of a model, which stay as they are.
        apart: (site, original) -> whether to keep this site.

    Returns:
        New sites, in the same order.
    """
    by_name = {site.name: site for site in sites}
    original = {
        site.name: site.copy_of
        for site in sites
        if site.copy_of is not None and not apart(site, by_name[site.copy_of])
    }
    kept: dict[str, Site] = {}
    for site in sites:
        if site.name not in original:
            later = {original.get(name, name) for name in site.descendants} - {site.name}
            kept[site.name] = replace(
                site, aliases=list(site.aliases), descendants=later, copies=[]
            )
            continue
        one = kept[original[site.name]]
        one.aliases += site.names
        one.copies.append(site.name)
        one.passive = one.passive and site.passive
    return list(kept.values())


def _version(output: Tensor) -> int:
    """Return the count of in-place changes; inference tensors have none."""
    return -1 if output.is_inference() else output._version


def _original(output: Tensor) -> Tensor:
    """Return the tensor that a view only reshapes, or the tensor itself."""
    base = output._base
    return base if base is not None and base.numel() == output.numel() else output
