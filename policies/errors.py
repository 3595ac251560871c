"""The one exception of this room that a user is meant to see."""


class PolicyError(ValueError):
    """Bad input to a policy; the message is one line naming the file or key and the remedy."""
