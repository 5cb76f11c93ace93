"""Errors that the worker tells apart."""


class RefusedError(Exception):
    """The job cannot be done as it stands, and starting again changes nothing. The text is one clear sentence."""
