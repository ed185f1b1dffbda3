"""Measure during training: a monitor, stopping rules, and a live trend between measurements."""

from fisherfast.training.attainable import attainable_error, attainable_error_of_samples
from fisherfast.training.monitor import FisherMonitor
from fisherfast.training.record import EpochRecord
from fisherfast.training.stopping import FisherEarlyStopping

__all__ = [
    "EpochRecord",
    "FisherEarlyStopping",
    "FisherMonitor",
    "attainable_error",
    "attainable_error_of_samples",
]
