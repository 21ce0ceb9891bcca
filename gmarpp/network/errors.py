"""Errors of networks that cannot be explained."""


class UnsupportedNetworkError(ValueError):
    """A network whose attention cannot be followed from its output to its input tokens."""
