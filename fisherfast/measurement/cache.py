"""Results reused between measurements of the same model and data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from fisherfast.data import Data
from fisherfast.model.sites import INPUT, Site
from fisherfast.results.flow import FisherFlow
from fisherfast.results.information_map import InformationMap
from fisherfast.results.layer import LayerFisher


@dataclass
class Recall:
    """Layers, their chains, and the information in the input, which training does not change.

    Attributes:
        sites: the measured layers with their chains; None until two measurements agree on them,
            because a weight that is zero at first hides a path.
        input: the result for the input; None if each measurement may have other samples.
        input_map: its map, if any.
        spaces: by compressed layer, the weights learned from each half of its samples.
    """

    sites: list[Site] | None = None
    input: LayerFisher | None = None
    input_map: InformationMap | None = None
    spaces: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    _chains: dict[str, set[str]] | None = field(default=None, init=False, repr=False)

    def unknown(self, sites: list[Site]) -> list[Site]:
        """Return the sites that must be measured."""
        return [site for site in sites if site.name != INPUT or self.input is None]

    def complete(self, flow: FisherFlow, sites: list[Site], data: Data) -> FisherFlow:
        """Add what was not measured again to a flow, and keep what the next one can reuse."""
        if self.sites is None:
            chains = {site.name: set(site.descendants) for site in sites}
            self.sites = sites if chains == self._chains else None
            self._chains = chains
        if self.input is not None:
            maps = {} if self.input_map is None else {INPUT: self.input_map}
            return replace(flow, layers=(self.input, *flow.layers), maps=maps | flow.maps)
        if flow.names[0] == INPUT and data.repeatable:
            self.input, self.input_map = flow.layers[0], flow.maps.get(INPUT)
        return flow
