"""Errors that the worker distinguishes."""


class RefusedError(Exception):
    """The job cannot run as configured; a restart would not help. The text is one clear sentence."""


class ChangedError(RefusedError):
    """The job differs from that of its checkpoint, so it can only begin anew."""


class NotFiniteError(RuntimeError):
    """The loss of an update is NaN or infinite: the weights are spoiled and are not saved."""
