"""The demo: a network learns to read the position of an object from noisy camera images, and the
Fisher information in its layers is measured after every epoch.

`python -m fisherfast demo` runs it. `imaging` makes the samples, `training` trains and measures,
`report` writes figures, numbers and the page `report.html`.
"""

from fisherfast.demo.imaging import ImagingTask, imaging_task
from fisherfast.demo.runner import run_demo
from fisherfast.demo.training import Task

__all__ = ["ImagingTask", "Task", "imaging_task", "run_demo"]
