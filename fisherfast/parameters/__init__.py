"""The Fisher matrix of a network's own parameters w, for p(y | x, w)."""

from fisherfast.parameters.analysis.consolidation import ElasticWeightConsolidation
from fisherfast.parameters.analysis.effective_dimension import EffectiveDimension
from fisherfast.parameters.analysis.importance import Importance
from fisherfast.parameters.analysis.score import MeanZeroTest, Scores, score
from fisherfast.parameters.analysis.spectrum import Spectrum
from fisherfast.parameters.fisher import fisher, from_state_dict
from fisherfast.parameters.layout import ParameterLayout
from fisherfast.parameters.likelihood import Likelihood
from fisherfast.parameters.likelihoods import Bernoulli, Categorical, Gaussian, Poisson
from fisherfast.parameters.structures.base import ParameterFisher
from fisherfast.parameters.structures.block import BlockFisher, FullFisher
from fisherfast.parameters.structures.diagonal import DiagonalFisher
from fisherfast.parameters.structures.gram import GramFisher
from fisherfast.parameters.structures.kfac import KroneckerFisher
from fisherfast.parameters.structures.lowrank import LowRankFisher
from fisherfast.parameters.structures.streamed import StreamedFisher

__all__ = [
    "Bernoulli",
    "BlockFisher",
    "Categorical",
    "DiagonalFisher",
    "EffectiveDimension",
    "ElasticWeightConsolidation",
    "FullFisher",
    "Gaussian",
    "GramFisher",
    "Importance",
    "KroneckerFisher",
    "Likelihood",
    "LowRankFisher",
    "MeanZeroTest",
    "ParameterFisher",
    "ParameterLayout",
    "Poisson",
    "Scores",
    "Spectrum",
    "StreamedFisher",
    "fisher",
    "from_state_dict",
    "score",
]
