"""The one exception of this room that a user is meant to see."""


class SimError(RuntimeError):
    """Bad input to a simulation; the message is one line naming the task or key and the remedy."""
