"""Demonstrations: a network learns to read theta, and the information in its layers is measured.

`python -m fisherfast demo imaging | gaussian | lognormal` runs one and writes a report. A `Task`
says what is learned, `training` learns and measures, `report` writes figures, numbers and a page.
"""

from fisherfast.demos.imaging import imaging_task
from fisherfast.demos.published import gaussian_task, lognormal_task
from fisherfast.demos.runner import run_demo
from fisherfast.demos.task import Task

__all__ = ["Task", "gaussian_task", "imaging_task", "lognormal_task", "run_demo"]
