"""Warnings and errors that several parts of the library raise."""


class FisherWarning(UserWarning):
    """Warn that a result may be wrong: the finite step is too wide, the mean score is far from
    zero, samples do not depend on theta or depend on each other, or the network draws random
    numbers in eval mode."""
