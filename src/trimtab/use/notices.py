"""What is told of a series while models train on it: once, and under the name that the user knows."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class _Once(logging.Filter):
    def __init__(self, path: str, name: str) -> None:
        super().__init__()
        self._path, self._name = path, name
        self._before: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if not message.startswith(f"{self._path}: "):
            return True
        record.msg, record.args = self._name + message.removeprefix(self._path), ()
        is_new = message not in self._before
        self._before.add(message)
        return is_new


@contextmanager
def told_once(path: str, name: str) -> Iterator[None]:
    """Inside, each warning about the series of this path or name is told once, and as one about `name`."""
    logger, once = logging.getLogger("trimtab"), _Once(path, name)
    logger.addFilter(once)
    try:
        yield
    finally:
        logger.removeFilter(once)
