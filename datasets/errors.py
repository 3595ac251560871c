"""The one exception of this room that a user is meant to see."""


class DataError(ValueError):
    """Bad demonstrations; the message is one line naming the file, the key and the remedy."""
