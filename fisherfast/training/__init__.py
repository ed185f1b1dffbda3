"""In training: what a monitor records, when to stop, and a live trend between measurements."""

from fisherfast.training.monitor import FisherMonitor
from fisherfast.training.record import EpochRecord

__all__ = ["EpochRecord", "FisherMonitor"]
