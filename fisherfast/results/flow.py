"""`FisherFlow`: the Fisher information of every layer of a network."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fisherfast._fields import build, has_version, plain, read
from fisherfast._files import read_flow, write_flow
from fisherfast._version import __version__
from fisherfast.model.sites import INPUT
from fisherfast.results import forecast_plots, plots, table
from fisherfast.results.comparison import LayerComparison, compare, exceeds, ratio
from fisherfast.results.information_map import MAX_MAP_NUMBERS, InformationMap, has_map, is_mapped
from fisherfast.results.layer import LayerFisher

FORMAT = "fisherfast.flow"

FORMAT_VERSION = 1

_HEADER = ("format", "format_version")

_SETTINGS = {"source": str, "output": str | None, "maps": bool | tuple[str, ...]}
"""Kinds of the settings that a flow itself uses."""


@dataclass(frozen=True, eq=False, repr=False)
class FisherFlow:
    """Fisher information of every layer, in execution order from "input" to "output".

    Index it by name or alias (``flow["fc2"].J``), iterate over its `LayerFisher`, or print it for a
    table. The *linear* information of a layer may exceed that of the layer before it: it is a lower
    bound, and a non-linear layer can make information linearly readable. The true information never
    rises along a chain: see `tightened`.

    Attributes:
        layers: in execution order.
        settings: arguments of the measurement.
        version: of the library that measured.
        maps: by name of the layer, see `map`.
    """

    layers: tuple[LayerFisher, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    version: str = __version__
    maps: dict[str, InformationMap] = field(default_factory=dict)

    def __getitem__(self, name: str) -> LayerFisher:
        for layer in self.layers:
            if name and name in (layer.name, *layer.aliases, layer.label):
                return layer
        known = [*self.names, *(alias for layer in self.layers for alias in layer.aliases)]
        raise KeyError(f"layer must be one of {known}, got {name!r}")

    def __contains__(self, name: object) -> bool:
        return any(
            name and name in (layer.name, *layer.aliases, layer.label) for layer in self.layers
        )

    def __iter__(self) -> Iterator[LayerFisher]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def names(self) -> list[str]:
        """Names of the layers in execution order."""
        return [layer.name for layer in self.layers]

    @property
    def parameters(self) -> int:
        """P."""
        return self.layers[0].parameters

    def fractions(self) -> dict[str, float]:
        """Return J / J_input of each layer; tr(J_input^-1 J) / P for P parameters. Dimensionless.

        NaN if J_input is within three errors of zero in some direction. Errors are in
        `fraction_errors`; for the ratio of two other layers see `compare`.
        """
        return {name: value for name, (value, _) in self._ratios().items()}

    def fraction_errors(self) -> dict[str, float]:
        """Return standard errors of `fractions`, from a jackknife of the ratio over the folds of
        the samples that layer and input share."""
        return {name: error for name, (_, error) in self._ratios().items()}

    def compare(self, a: str, b: str) -> LayerComparison:
        """Compute ratio J_a / J_b and difference J_a - J_b of two layers, with standard errors.

        Both layers are measured on the same samples, so their errors are correlated, and those of
        ratio and difference are smaller than the two added in quadrature.

        Args:
            a, b: names of layers.

        Returns:
            `LayerComparison`; for P parameters also the ratio by direction. The ratios are NaN if
            J_b is within three errors of zero.

        Raises:
            KeyError: there is no such layer.

        Example:
            >>> import torch, fisherfast as ff
            >>> x = torch.randn(2, 2000, 4)
            >>> data = ff.FiniteDifference(x[0] - 0.1, x[1] + 0.1, dtheta=0.2)
            >>> flow = ff.fisher_flow(torch.nn.Linear(4, 2), data)
            >>> flow.compare("output", "input").ratio < 1
            True
        """
        return compare(self[a], self[b])

    def tightened(self) -> FisherFlow:
        """Raise the J of each layer to that of later layers which are functions of it alone.

        Any function of a later layer is a function of an earlier one, so I_l >= J_m for m after l
        along a chain. Chains are found by the measurement (`LayerFisher.descendants`); a layer
        inside a residual branch is not raised by layers after the sum. A later J must be larger in
        every direction, and by more than the largest of that many layers would be by chance.
        """
        by_name = {layer.name: layer for layer in self}
        tight = []
        for layer in self:
            best = layer
            later = [by_name[name] for name in layer.descendants if name in by_name]
            while found := [other for other in later if exceeds(other, best, len(later))]:
                best = max(found, key=lambda other: _trace_of_ratio(other.J, found[0].J))
            if best is not layer:
                layer = replace(
                    layer,
                    J=best.J,
                    stderr=best.stderr,
                    error_covariance=best.error_covariance,
                    replicates=best.replicates,
                    status=best.status,
                    carried=best.carried,
                    independent=best.independent,
                    notes=(*layer.notes, f"tightened by {best.name}"),
                )
            tight.append(layer)
        return replace(self, layers=tuple(tight))

    def with_prior(self, precision: Any) -> FisherFlow:
        """Add the information of a prior to every layer: `LayerFisher.with_prior`. Ratios of layers
        are then those of data and prior together."""
        return replace(self, layers=tuple(layer.with_prior(precision) for layer in self))

    def map(self, name: str) -> InformationMap:
        """Return the linear Fisher information of the channels at each position of a layer
        [C, H, W], in 1/theta^2, measured with ``settings=ff.Settings(maps=True)``.

        Raises:
            KeyError: there is no such layer.
            ValueError: the flow was measured without maps, or the layer has no positions.
        """
        layer = self[name]
        if not self.settings.get("maps", False):
            raise ValueError(
                "flow must have been measured with maps, settings=Settings(maps=True), got none"
            )
        if layer.name in self.maps:
            return self.maps[layer.name]
        maps = self.settings["maps"]
        if not is_mapped(maps, (layer.name, *layer.aliases)):
            raise ValueError(f"layer must be one of maps={maps}, got {name!r}")
        shape = list(layer.shape)
        if len(shape) == 3 and not has_map(layer.shape):
            raise ValueError(
                f"layer {name!r} must have H W C^2 <= {MAX_MAP_NUMBERS} for a map, got {shape}"
            )
        raise ValueError(f"layer {name!r} must have a shape [C, H, W] for a map, got {shape}")

    def plot(self, ax: Any = None, **style: Any) -> Any:
        """Plot J with error bars and the honest bound against the layers, and return the matplotlib
        axes."""
        return plots.plot_flow(self, ax, **style)

    def plot_ellipses(
        self,
        layers: Sequence[str] = ("input", "output"),
        params: Sequence[int | str] | None = None,
        *,
        levels: Sequence[float] = forecast_plots.LEVELS,
        center: Sequence[float] | None = None,
    ) -> Any:
        """Plot the credible ellipses of layers, one panel for each pair of parameters, and return
        the matplotlib figure.

        Args:
            layers: names of layers.
            params: two or more parameters, numbers or names; None for all.
            levels: credible levels, between 0 and 1.
            center: theta of these parameters; None draws deviations.
        """
        shown = [self[name] for name in layers]
        return forecast_plots.plot_ellipses(shown, params, levels=levels, center=center)

    def plot_profile(
        self,
        layers: Sequence[str] = ("input", "output"),
        errors: tuple[nn.Module, Any, Any] | None = None,
    ) -> Any:
        """Plot the Cramer-Rao bounds of layers along theta, and return the matplotlib figure.

        Args:
            layers: names of layers with a `profile`.
            errors: (model, x, theta) also draws RMS error, standard deviation and bias of the
                model's estimates, see `Profile.errors`. A biased estimate may be below the bound.
        """
        shown = [self[name] for name in layers]
        profile = shown[0].profile if shown else None
        found = None if errors is None or profile is None else profile.errors(*errors)
        return forecast_plots.plot_profile(shown, found)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings and lists, which `save` writes as JSON."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **plain(self),
            "settings": copy.deepcopy(self.settings),
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> FisherFlow:
        """Rebuild a flow from the result of `to_dict`. Raises ValueError for anything else."""
        if not has_version(content, "format", FORMAT):
            raise ValueError(
                f"content must be a saved flow (format {FORMAT!r}), got another format"
            )
        if not has_version(content, "format_version", FORMAT_VERSION):
            raise ValueError(
                f"format_version must be {FORMAT_VERSION}, got {content.get('format_version')}:"
                " use the version of fisherfast that wrote the file"
            )
        return build(cls, {key: part for key, part in content.items() if key not in _HEADER})

    def check_fields(self) -> None:
        """Raise ValueError unless the fields of a rebuilt flow fit together."""
        if not self.layers or self.layers[0].name != INPUT:
            raise ValueError(f"layers must begin with {INPUT!r}, got {self.names[:1]}")
        for number, layer in enumerate(self.layers):
            if layer.name in self.names[:number]:
                raise ValueError(f"layers must have different names, got {layer.name!r} twice")
            if layer.parameters != self.parameters:
                raise ValueError(
                    f"layers must have {self.parameters} parameters like the input, got"
                    f" {layer.parameters} of {layer.name!r}"
                )
        for name, each in self.maps.items():
            if name not in self.names or each.name != name:
                raise ValueError(f"maps must be of the layers, got {name!r} for {each.name!r}")
            if each.J.shape[-1] != self.parameters:
                raise ValueError(
                    f"maps must have {self.parameters} parameters, got {each.J.shape[-1]}"
                )
        for name, kind in _SETTINGS.items():
            if name in self.settings:
                read(kind, self.settings[name], f"settings[{name!r}]")

    def save(self, path: str | Path) -> None:
        """Write to a .json or .npz file (by its ending). Numbers are stored exactly, without
        pickle."""
        write_flow(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> FisherFlow:
        """Read a file of `save`.

        Raises:
            ValueError: the file is damaged or of another kind.
            FileNotFoundError: there is no such file.
        """
        content = read_flow(Path(path))
        try:
            return cls.from_dict(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def table(self, *, full: bool = False) -> list[list[str]]:
        """Return the header and one row of text per layer, as printed.

        Layers that are no cut are indented below the last cut. In a long table those of one block
        share a row.

        Args:
            full: a row for every layer.
        """
        return table.rows(self.layers, self._ratios(), full=full)

    def __repr__(self) -> str:
        return table.as_text(self.table(), self._footnotes())

    def _repr_html_(self) -> str:
        return table.as_html(self.table(), self._footnotes())

    def _footnotes(self) -> list[str]:
        source = self.settings.get("source", "no finite step")
        return table.footnotes(self.layers, source)

    def _ratios(self) -> dict[str, tuple[float, float]]:
        """Compute J / J_input of each layer and its standard error."""
        source = self.layers[0]
        if source.name != "input":
            raise ValueError(f"the first layer must be the input, got {source.name!r}")
        return {layer.name: ratio(layer, source) for layer in self}


def _trace_of_ratio(J: torch.Tensor, unit: torch.Tensor) -> float:
    """Compute the trace of J relative to another, in which the units of theta cancel."""
    return float((J.diagonal() / unit.diagonal().abs()).nan_to_num().sum())
