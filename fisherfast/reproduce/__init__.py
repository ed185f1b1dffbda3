"""The published figures, measured again: `python -m fisherfast reproduce fig3 | ... | all`.

`figure` says what a figure is and what a run of it needs, `lift`, `flows` and `stopping` measure,
`drawing` draws, `runner` runs several and writes numbers and figures, `command` is the verb of the
command line. The published numbers stand in `fisherfast.problems.published`.
"""

from fisherfast.reproduce.figure import Context, Figure, Options, Outcome
from fisherfast.reproduce.runner import FIGURES, run_figures

__all__ = ["FIGURES", "Context", "Figure", "Options", "Outcome", "run_figures"]
