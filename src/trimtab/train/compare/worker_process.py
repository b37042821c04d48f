"""What a worker process does; `trimtab.train.compare.workers` starts it and holds the other end of its pipe."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import torch

from trimtab.train.compare.parcels import unpack

logger = logging.getLogger("trimtab")


def serve(connection: "Connection[Any, Any]", threads: int, environment: Mapping[str, str]) -> None:
    """Do what comes through the pipe until an empty message comes, or the pipe breaks.

    Args:
        connection: bytes of `pack((work, task))` in; ("ready", None), ("news", ...), ("log", (level, format, text)),
            ("outcome", ...) and ("lost", (name of an exception, what it says)) out.
        threads: of torch.
        environment: variables to set.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the server ignores it
    os.environ.update(environment)  # a fork has that of the server
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # a terminal's Ctrl-C is for the main process to handle
    parcels: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_receive, args=(connection, parcels), daemon=True).start()
    sending = threading.Lock()

    def send(kind: str, news: Any) -> None:
        with sending:
            connection.send((kind, news))

    logger.addHandler(_Sender(send))
    logger.propagate = False
    torch.set_num_threads(threads)
    send("ready", None)
    while parcel := parcels.get():
        try:
            work, task = unpack(parcel)
            outcome = work(task, lambda news: send("news", news))
        except Exception as error:
            send("lost", (type(error).__name__, str(error)))
        else:
            send("outcome", outcome)


def _receive(connection: "Connection[Any, Any]", parcels: "SimpleQueue[bytes]") -> None:
    try:
        while True:
            parcels.put(connection.recv_bytes())
    except (EOFError, OSError):  # the main process is gone
        os._exit(1)


class _Sender(logging.Handler):
    """Sends what is logged in a worker to the main process."""

    def __init__(self, send: Callable[[str, Any], None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send("log", (record.levelno, "%s", record.getMessage()))
