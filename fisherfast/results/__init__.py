"""Measurement results: numbers with errors, tables, files, figures."""

from fisherfast.results.combination import combine
from fisherfast.results.comparison import LayerComparison
from fisherfast.results.flow import FisherFlow
from fisherfast.results.forecast import Ellipse
from fisherfast.results.information_map import InformationMap
from fisherfast.results.layer import LayerFisher
from fisherfast.results.marginal import MarginalFisher

__all__ = [
    "Ellipse",
    "FisherFlow",
    "InformationMap",
    "LayerComparison",
    "LayerFisher",
    "MarginalFisher",
    "combine",
]
