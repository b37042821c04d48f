"""What is to be told of data while they are loaded."""

import logging
import os

_log = logging.getLogger("trimtab")


def warn(message: str) -> None:
    """Tell of what was found in a set; of several processes the first one does."""
    if os.environ.get("RANK", "0") == "0":
        _log.warning("%s", message)
