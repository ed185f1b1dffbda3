"""The other Fisher information: that of a network's own parameters w, for p(y | x, w)."""

from fisherfast.parameters.block import BlockFisher
from fisherfast.parameters.consolidation import ElasticWeightConsolidation
from fisherfast.parameters.diagonal import DiagonalFisher
from fisherfast.parameters.effective_dimension import (
    EffectiveDimension,
    effective_dimension,
    local_effective_dimension,
)
from fisherfast.parameters.fisher import fisher, from_state_dict
from fisherfast.parameters.full import FullFisher
from fisherfast.parameters.gram import GramFisher
from fisherfast.parameters.importance import Importance, importance
from fisherfast.parameters.kfac import KroneckerFisher
from fisherfast.parameters.layout import ParameterLayout
from fisherfast.parameters.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Poisson
from fisherfast.parameters.lowrank import LowRankFisher
from fisherfast.parameters.matrix import ParameterFisher
from fisherfast.parameters.score import MeanZeroTest, Scores, score
from fisherfast.parameters.spectrum import Spectrum, spectrum

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
    "effective_dimension",
    "fisher",
    "from_state_dict",
    "importance",
    "local_effective_dimension",
    "score",
    "spectrum",
]
