"""Where a server is to listen."""

from __future__ import annotations

import socket

from align.errors import AlignError


def refuse_taken(host: str, port: int) -> None:
    """Find out before a model is loaded whether a server can listen there.

    Raises:
        AlignError: somebody does, there is no such port, or it is no address of this machine.
    """
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise AlignError(f"nothing can listen at {host}:{port} ({why}): name another --host or --port") from error
