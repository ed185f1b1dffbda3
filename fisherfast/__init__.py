"""Fisher information of every layer of a PyTorch network.

flow = ff.fisher_flow(model, ff.FiniteDifference(x_minus, x_plus, dtheta=0.06))
"""

from fisherfast import dual, ops, parameters, problems
from fisherfast._errors import FisherWarning
from fisherfast._version import __version__
from fisherfast.data import FiniteDifference, Labelled, Pathwise, Score, Shard, Simulator
from fisherfast.dual import jvp, propagate
from fisherfast.flow import fisher_flow, fisher_information
from fisherfast.measurement.settings import Settings
from fisherfast.results.combination import combine
from fisherfast.results.comparison import LayerComparison
from fisherfast.results.flow import FisherFlow
from fisherfast.results.forecast import Ellipse
from fisherfast.results.information_map import InformationMap
from fisherfast.results.layer import LayerFisher
from fisherfast.results.marginal import MarginalFisher
from fisherfast.results.profile import Profile
from fisherfast.training import (
    CramerRao,
    EpochRecord,
    FisherEarlyStopping,
    FisherMonitor,
    Transmission,
)
from fisherfast.training.loss import InformationLoss, linear_fisher

__all__ = [
    "CramerRao",
    "Ellipse",
    "EpochRecord",
    "FiniteDifference",
    "FisherEarlyStopping",
    "FisherFlow",
    "FisherMonitor",
    "FisherWarning",
    "InformationLoss",
    "InformationMap",
    "Labelled",
    "LayerComparison",
    "LayerFisher",
    "MarginalFisher",
    "Pathwise",
    "Profile",
    "Score",
    "Settings",
    "Shard",
    "Simulator",
    "Transmission",
    "__version__",
    "combine",
    "dual",
    "fisher_flow",
    "fisher_information",
    "jvp",
    "linear_fisher",
    "ops",
    "parameters",
    "problems",
    "propagate",
]
