"""What a machine without graphics may skip."""

import pytest


def skip_without_graphics(error):
    """Skip where no graphics library can be loaded; every other error is a defect and fails the test."""
    if "cannot render off screen" not in str(error):
        raise error
    pytest.skip(str(error))
