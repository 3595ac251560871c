"""The one exception of this room that a user is meant to see."""


class DataError(ValueError):
    """Bad demonstrations; the message is one line naming the file, the key and the remedy."""


def in_one_line(error: Exception) -> str:
    """What a library raised, for use inside a message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
