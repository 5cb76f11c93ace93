"""Errors that the worker tells apart."""


class RefusedError(Exception):
    """The job cannot be done as it stands, and starting again changes nothing. The text is one clear sentence."""


class NotFiniteError(RuntimeError):
    """The loss of an update is NaN or infinite: the weights are spoiled, and nothing is saved of them."""
