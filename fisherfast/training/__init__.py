"""Measure during training: a monitor, stopping rules, and a live trend between measurements."""

from fisherfast.training.attainable import attainable_error, attainable_error_of_samples
from fisherfast.training.monitor import FisherMonitor
from fisherfast.training.record import EpochRecord
from fisherfast.training.rules import CramerRao, Transmission
from fisherfast.training.stopping import FisherEarlyStopping

__all__ = [
    "CramerRao",
    "EpochRecord",
    "FisherEarlyStopping",
    "FisherMonitor",
    "Transmission",
    "attainable_error",
    "attainable_error_of_samples",
]
