"""The one exception of this room that a user is meant to see."""


class FinetuneError(ValueError):
    """Fine-tuning that cannot start or go on; the message is one line naming the cause and the remedy."""
