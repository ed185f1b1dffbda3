"""What a measurement returns: `LayerFisher` for one layer, `FisherFlow` for all of them; tables and
files."""

from __future__ import annotations

import copy
import html
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fisherfast._version import __version__
from fisherfast.comparison import (
    LayerComparison,
    compare,
    divides,
    exceeds,
    ratio,
    unresolved_note,
)
from fisherfast.information_map import MAX_MAP_NUMBERS, InformationMap, has_map, is_mapped
from fisherfast.marginal import SINGULAR, MarginalFisher, cramer_rao, marginal_fisher

__all__ = [
    "NOT_INDEPENDENT",
    "FisherFlow",
    "FisherWarning",
    "LayerFisher",
    "finite_step_note",
    "warn_of",
]

FORMAT = "fisherfast.flow"
FORMAT_VERSION = 1

NOT_INDEPENDENT = (
    "neighbouring samples depend on each other (pairs, repeated measurements, a time series, or a"
    " sorted file), but errors and bounds are those of independent ones: say with groups= which"
    " samples belong together, or shuffle a file that is only sorted"
)

FINITE_STEP_LIMIT = 0.3
"""dtheta sqrt(J) / 2 above which the finite step overshoots by more than 0.4 % (Gaussian shift)."""


class FisherWarning(UserWarning):
    """A result needs care: a finite step too wide, a mean score far from zero, samples that do not
    depend on theta or that depend on each other, random numbers in eval mode."""


@dataclass(frozen=True, eq=False, repr=False)
class LayerFisher:
    """Fisher information in the activations of one layer.

    All matrices are float64 [P, P] on the CPU, per unit of theta squared. For one parameter
    `value`, or ``float(layer)``, is J as a number.

    Attributes:
        name: of the layer; "input" for the data themselves.
        kind: class of the module, or the function.
        shape: of one sample's activations.
        J: best estimate of the linear Fisher information of the features, free of bias; a lower
            bound of the Fisher information. May be negative within its error when the truth is near
            0: it is not clipped.
        stderr: standard error of J.
        lower: the honest bound: a readout learned on one half of the samples, measured on the
            other.
        lower_stderr: its standard error.
        linear: linear Fisher information of the raw activations, without lift; same correction as
            J (and the same as J for a wide layer).
        linear_stderr: its standard error.
        naive: J without any finite-sample correction (biased upwards).
        curve_k: [K'] int64 numbers of features at which the curve is kept.
        curve_J: [K', P, P] J of the first k features.
        curve_stderr: [K', P, P] standard errors.
        features: number of features k that J was taken at; for "krylov" the larger of those of its
            two halves.
        feature_kind: "raw", "lift", "krylov" or "sketch" for a wide layer, or "none" for a layer
            without variation (J = 0).
        effective_dim: k_eff, features that count after the ridge.
        samples: all samples used, over conditions.
        dropped: activations and features that never varied and were left out.
        plateau: a plateau of the curve was reached before the last feature.
        dtheta: [P] full separation of the conditions; empty where there was no finite step.
        aliases: other names of the same activations.
        descendants: names of layers that are a function of this one alone.
        notes: what a reader should know.
        error_covariance: [m, m] covariance of the errors of the lower triangle of J, row by row, m
            = P (P + 1) / 2; None where unknown. `marginal` takes its error from it.
        response: [d, P] derivative of the mean activations, in their unit per unit of theta, of
            layers with at most 16 of them; None for others. The output of an unbiased estimator
            has the unit matrix.
        status: how far J is to be believed: "unresolved", "noisy", "rising" or "resolved".
        compressed: the activations were compressed before they were measured.
        carried: the arithmetic carries the condition of the covariance; where not, information may
            lie below the rounding of the activations.
        independent: no dependence between neighbouring samples was found; errors and bounds assume
            that there is none.
        sensitive: more features that add a tenth of J would have been noticed.
        rounding: share of its information about a parameter, when others are unknown, below which
            J is rounding: `crlb` is infinite there.
        replicates: [F, P, P] J without each fold of the samples, scaled so that their jackknife is
            the covariance of the error of J. All layers of a flow leave out the same samples, so
            the error of any function of several layers follows. Empty where there are none.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    J: torch.Tensor
    stderr: torch.Tensor
    lower: torch.Tensor
    lower_stderr: torch.Tensor
    linear: torch.Tensor
    linear_stderr: torch.Tensor
    naive: torch.Tensor
    curve_k: torch.Tensor
    curve_J: torch.Tensor
    curve_stderr: torch.Tensor
    features: int
    feature_kind: str
    effective_dim: float
    samples: int
    dropped: int
    plateau: bool
    dtheta: tuple[float, ...]
    aliases: tuple[str, ...] = ()
    descendants: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    error_covariance: torch.Tensor | None = None
    response: torch.Tensor | None = None
    status: str = "unresolved"
    compressed: bool = False
    carried: bool = True
    independent: bool = True
    sensitive: bool = True
    rounding: float = SINGULAR
    replicates: torch.Tensor = field(
        default_factory=lambda: torch.empty(0, 0, 0, dtype=torch.float64, device="cpu")
    )

    @property
    def converged(self) -> bool:
        """Whether J may be taken as it is: status == "resolved"."""
        return self.status == "resolved"

    @property
    def dim(self) -> int:
        """d, the number of activations of one sample."""
        return math.prod(self.shape)

    @property
    def parameters(self) -> int:
        """P."""
        return len(self.J)

    @property
    def value(self) -> float:
        """J as a number in 1/theta^2; for one parameter only."""
        if self.parameters != 1:
            raise ValueError(
                f"value must be asked for one parameter, got {self.parameters}: use .J"
            )
        return float(self.J)

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        return (
            f"LayerFisher({self.name!r}, J={_numbers(self.J)}, stderr={_numbers(self.stderr)},"
            f" lower={_numbers(self.lower)}, features={self.features})"
        )

    @property
    def crlb(self) -> torch.Tensor:
        """Cramer-Rao bound [P] float64 in the unit of theta: sqrt of the diagonal of J^-1.

        The smallest standard deviation that an unbiased estimate from these features can have, all
        parameters unknown. Infinite where J is not positive definite, but for rounding.
        """
        return cramer_rao(self.J, self.rounding)

    def marginal(self, keep: int | Sequence[int]) -> MarginalFisher:
        """Information about some parameters, the others being unknown nuisances: the Schur
        complement J_aa - J_ab J_bb^-1 J_ba, in 1/theta^2.

        Its standard error is the first-order one, from the covariance of the errors of all entries
        of J. ``marginal([p]).J`` is ``crlb[p] ** -2``. Nuisances that stand for each other count
        once, those not seen at all do not; NaN where their J is not positive semi-definite.

        Args:
            keep: the parameters kept, one number or several; negative ones count from the end.

        Raises:
            ValueError: keep is empty, or names a parameter twice or one that does not exist.
            TypeError: keep holds something else than whole numbers.

        Example:
            >>> import torch, fisherfast as ff
            >>> x, tangents = torch.randn(1000, 2), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
            >>> dx = tangents[:, None].expand(2, 1000, 2)       # J = [[1, 0.6], [0.6, 1]]
            >>> input = ff.fisher_information(ff.Pathwise(x, dx))
            >>> abs(input.marginal(0).value - 0.64) < 0.2       # 1 - 0.6^2 / 1
            True
        """
        return marginal_fisher(self.J, self.error_covariance, keep, self.rounding)

    @property
    def finite_step(self) -> torch.Tensor:
        """dtheta sqrt(J) / 2 [P]: how far each condition is from theta in units of its
        uncertainty. Zero where there was no finite step."""
        if not self.dtheta:
            return torch.zeros(self.parameters, dtype=torch.float64, device="cpu")
        step = torch.tensor(self.dtheta, dtype=torch.float64, device="cpu")
        return step * self.J.diagonal().clamp_min(0).sqrt() / 2

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and nested lists; NaN and infinity as "nan", "inf"."""
        entry = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        return {name: value for name, value in entry.items() if value is not None}

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> LayerFisher:
        """Rebuild what `to_dict` returned.

        Raises:
            KeyError, TypeError, ValueError: an entry is missing or of a wrong kind.
        """
        added = {"error_covariance", "response"} - set(entry)  # where there is none
        values = {f.name: entry[f.name] for f in fields(cls) if f.name not in added}
        parameters = len(values["J"])
        if "error_covariance" in values:
            numbers = np.array(values["error_covariance"], dtype=np.float64)
            entries = parameters * (parameters + 1) // 2
            values["error_covariance"] = torch.from_numpy(numbers.reshape(entries, entries))
        if "response" in values:
            response = np.array(values["response"], dtype=np.float64)
            values["response"] = torch.from_numpy(response.reshape(-1, parameters))
        if len(values["dtheta"]) not in (0, parameters):
            raise ValueError(
                f"dtheta must hold {parameters} steps or none, got {len(values['dtheta'])}"
            )
        for name in _MATRICES:
            numbers = np.array(values[name], dtype=np.float64)
            stacked = name.startswith("curve") or name == "replicates"
            shape = (-1, parameters, parameters) if stacked else (parameters,) * 2
            values[name] = torch.from_numpy(numbers.reshape(shape))
        values["effective_dim"] = float(values["effective_dim"])
        values["curve_k"] = torch.tensor(values["curve_k"], dtype=torch.int64, device="cpu")
        for name in ("shape", "dtheta", "aliases", "descendants", "notes"):
            values[name] = tuple(values[name])
        lengths = {len(values[name]) for name in ("curve_k", "curve_J", "curve_stderr")}
        if len(lengths) > 1:
            raise ValueError(f"curves must have the same length, got {sorted(lengths)}")
        return cls(**values)


_MATRICES = (
    "J",
    "stderr",
    "lower",
    "lower_stderr",
    "linear",
    "linear_stderr",
    "naive",
    "curve_J",
    "curve_stderr",
    "replicates",
)


@dataclass(frozen=True, eq=False, repr=False)
class FisherFlow:
    """Fisher information of every layer, in execution order from "input" to "output".

    Index by name or alias (``flow["fc2"].J``), iterate over `LayerFisher`, print for a table. The
    *linear* information of a layer may exceed that of the layer before it: it is a bound, and a
    non-linear layer can make information linearly readable. The true information never rises along
    a chain: see `tightened`.

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
            if name == layer.name or name in layer.aliases:
                return layer
        known = [*self.names, *(alias for layer in self.layers for alias in layer.aliases)]
        raise KeyError(f"layer must be one of {known}, got {name!r}")

    def __contains__(self, name: object) -> bool:
        return any(name == layer.name or name in layer.aliases for layer in self.layers)

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
        """J / J_input of each layer; tr(J_input^-1 J) / P for P parameters. Dimensionless.

        NaN where J_input is within three errors of zero in some direction. Errors in
        `fraction_errors`; for the ratio of two other layers see `compare`.
        """
        return {name: value for name, (value, _) in self._ratios().items()}

    def fraction_errors(self) -> dict[str, float]:
        """Standard errors of `fractions`: jackknife of the ratio over the folds of the samples that
        layer and input share."""
        return {name: error for name, (_, error) in self._ratios().items()}

    def compare(self, a: str, b: str) -> LayerComparison:
        """Ratio J_a / J_b and difference J_a - J_b of two layers, with their standard errors.

        Both layers have seen the same samples, so their errors are correlated and those of ratio
        and difference are smaller than the two added in square.

        Args:
            a, b: names of layers.

        Returns:
            `LayerComparison`; for P parameters also the ratio by direction. The ratios are NaN
            where J_b is within three errors of zero.

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
        """Use the network itself: information that a later layer shows was there before it.

        Any function of a later layer is a function of an earlier one, so I_l >= J_m for m after l
        along a chain. Chains are found by the measurement (`LayerFisher.descendants`); a layer
        inside a residual branch gets nothing from layers after the sum. A later J must be larger in
        every direction, and by more than chance makes the largest of that many layers.
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

    def map(self, name: str) -> InformationMap:
        """Linear Fisher information of the channels at each position of a layer [C, H, W], measured
        with ``maps=True``: where on the picture the information sits. J [H, W, P, P] in 1/theta^2.

        Raises:
            KeyError: there is no such layer.
            ValueError: the flow was measured without maps, or the layer has no positions.
        """
        layer = self[name]
        if not self.settings.get("maps", False):
            raise ValueError("flow must have been measured with maps=True, got a flow without maps")
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
        """J with error bars and the honest bound against the layers; returns the matplotlib
        axes."""
        from fisherfast import plots  # upwards, and late: matplotlib is optional

        return plots.plot_flow(self, ax, **style)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists: what `save` writes as JSON."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "version": self.version,
            "settings": copy.deepcopy(self.settings),
            "layers": [layer.to_dict() for layer in self],
            "maps": {name: entry.to_dict() for name, entry in self.maps.items()},
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> FisherFlow:
        """Rebuild what `to_dict` returned. Raises ValueError for anything else."""
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(
                f"content must be a saved flow (format {FORMAT!r}), got another format"
            )
        if content.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"format_version must be {FORMAT_VERSION}, got {content.get('format_version')}:"
                " use the version of fisherfast that wrote the file"
            )
        try:
            layers = tuple(LayerFisher.from_dict(entry) for entry in content["layers"])
            maps = {
                str(name): InformationMap.from_dict(entry)
                for name, entry in content.get("maps", {}).items()
            }
            return cls(layers, dict(content["settings"]), str(content["version"]), maps)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"content must be a complete flow, got a damaged one: {error!r}"
            ) from None

    def save(self, path: str | Path) -> None:
        """Write to a .json or .npz file (by its ending). Numbers survive exactly; nothing is
        pickled."""
        path = Path(path)
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        if path.suffix == ".json":
            path.write_text(text + "\n", encoding="utf-8")
        elif path.suffix == ".npz":
            np.savez_compressed(path, flow=np.frombuffer(text.encode(), dtype=np.uint8))
        else:
            raise ValueError(f"path must end in .json or .npz, got {path.name!r}")

    @classmethod
    def load(cls, path: str | Path) -> FisherFlow:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is damaged or something else.
            FileNotFoundError: there is none.
        """
        path = Path(path)
        if path.suffix not in (".json", ".npz"):
            raise ValueError(f"path must end in .json or .npz, got {path.name!r}")
        raw = path.read_bytes() if path.suffix == ".json" else _read_npz(path)
        try:
            content = json.loads(raw)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(
                f"{path} must hold a saved flow, got a damaged or foreign file: {error}"
            ) from None
        try:
            return cls.from_dict(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def table(self) -> list[list[str]]:
        """Header and one row of text per layer, as `print` shows them."""
        header = [
            "layer",
            "shape",
            "dim",
            "J",
            "+-",
            "lower",
            "J / J_input",
            "features",
            "status",
        ]
        rows = [header]
        for layer, (fraction, error) in zip(self, self._ratios().values(), strict=True):
            rows.append(
                [
                    " = ".join(_main_names(layer)),
                    "x".join(map(str, layer.shape)) or "1",
                    str(layer.dim),
                    _numbers(layer.J),
                    _numbers(layer.stderr),
                    _numbers(layer.lower),
                    "-" if math.isnan(fraction) else f"{fraction:.3f} +- {error:.3f}",
                    f"{layer.feature_kind} {layer.features}",
                    layer.status,
                ]
            )
        return rows

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        rows = self.table()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        left = {0, 1, len(widths) - 2, len(widths) - 1}
        lines = [
            "  ".join(
                cell.ljust(width) if i in left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        lines.append(self._footer())
        if not divides(self.layers[0]):
            lines.append(f"note: {unresolved_note(self.layers[0])}")
        lines += [f"note: {layer.name}: {note}" for layer in self for note in layer.notes]
        return "\n".join(lines)

    def _footer(self) -> str:
        step = ", ".join(f"{value:g}" for value in self.layers[0].dtheta)
        source = f"dtheta {step}" if step else self.settings.get("source", "no finite step")
        per = "diagonal of J shown; " if self.parameters > 1 else ""
        return f"J per unit of theta squared; {per}{source}; {self.layers[0].samples} samples"

    def _repr_html_(self) -> str:
        head, *rows = self.table()
        cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in rows
        )
        return (
            f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"
            f"<p>{html.escape(self._footer())}</p>"
        )

    def _ratios(self) -> dict[str, tuple[float, float]]:
        """J / J_input of each layer and its standard error."""
        source = self.layers[0]
        if source.name != "input":
            raise ValueError(f"the first layer must be the input, got {source.name!r}")
        return {layer.name: ratio(layer, source) for layer in self}


def finite_step_note(layer: LayerFisher) -> str | None:
    """A warning where the two conditions are too far apart for a derivative."""
    worst = float(layer.finite_step.max())
    if worst <= FINITE_STEP_LIMIT:
        return None
    return (
        f"dtheta sqrt(J) / 2 = {worst:.2f} > {FINITE_STEP_LIMIT}: the finite step distorts J;"
        f" use a dtheta about {FINITE_STEP_LIMIT / worst:.2f} times as large"
    )


def warn_of(layers: tuple[LayerFisher, ...], *, stacklevel: int = 4) -> None:
    """Warn, once each, of samples that depend on each other and of finite steps too wide."""
    dependent = [layer.name for layer in layers if not layer.independent]
    if dependent:
        names = ", ".join(dependent)
        warnings.warn(f"{NOT_INDEPENDENT} (layers: {names})", FisherWarning, stacklevel=stacklevel)
    noted = [(layer.name, note) for layer in layers if (note := finite_step_note(layer))]
    if noted:
        names = ", ".join(name for name, _ in noted)
        warnings.warn(f"{noted[0][1]} (layers: {names})", FisherWarning, stacklevel=stacklevel)


def _main_names(layer: LayerFisher) -> list[str]:
    """The name, and for the output the layer that it comes from."""
    return [layer.name, *layer.aliases[:1]] if layer.name == "output" else [layer.name]


def _trace_of_ratio(J: torch.Tensor, unit: torch.Tensor) -> float:
    """Sum over the parameters of J relative to another, so that the units of theta cancel."""
    return float((J.diagonal() / unit.diagonal().abs()).nan_to_num().sum())


def _numbers(matrix: torch.Tensor) -> str:
    return ", ".join(f"{float(value):.4g}" for value in matrix.diagonal())


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _read_npz(path: Path) -> bytes:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return bytes(archive["flow"].tobytes())
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} must hold a saved flow, got a damaged or foreign file: {error}"
        ) from None
