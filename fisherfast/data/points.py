"""`AtPoint`: data at several theta as seen from one of them."""

from __future__ import annotations

from fisherfast.data.batch import Data, Wrapper


class AtPoint(Wrapper):
    """The samples at one of several points of theta: a bin of labels, or the conditions of a
    simulator at one theta.

    A meter of one point asks it how many samples and conditions there are; the samples themselves
    are read from the data at all points.

    Args:
        data: at all points.
        point: number of the point.
    """

    def __init__(self, data: Data, point: int) -> None:
        super().__init__(data)
        self.points, self.siblings = 0, data.points
        self.spread = data.points if data.first_at(point) is None else 1
        self.conditions = data.at_each
        self.sharded = data.sharded
        self.groups = data.groups_at(point)
        self._point = point

    def samples(self, condition: int) -> int | None:
        """Return the number of samples of a condition at this point, or None if unknown."""
        return self._data.samples_at(self._point, condition)

    def length(self, condition: int) -> int | None:
        """As `samples`."""
        return self.samples(condition)

    @property
    def repeatable(self) -> bool:
        """As the data at all points."""
        return self._data.repeatable
