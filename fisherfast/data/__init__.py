"""Samples at theta: five sources with one interface.

`FiniteDifference`: two conditions a finite step apart. `Pathwise`: samples with their derivative.
`Score`: samples with the derivative of their log density. `Labelled`: samples with their theta.
`Simulator`: a function that draws samples. `Shard`: one process's part of any of these.
"""

from fisherfast.data.batch import Batch, Data
from fisherfast.data.finite_difference import FiniteDifference
from fisherfast.data.kept import KeptData
from fisherfast.data.labelled import Labelled
from fisherfast.data.per_sample import Pathwise, Score
from fisherfast.data.shard import Shard
from fisherfast.data.simulator import Simulator

__all__ = [
    "Batch",
    "Data",
    "FiniteDifference",
    "KeptData",
    "Labelled",
    "Pathwise",
    "Score",
    "Shard",
    "Simulator",
]
