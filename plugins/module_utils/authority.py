"""A private certificate authority, for modules that look something up before the node trusts it."""

from __future__ import annotations

import contextlib
import ssl
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Where Debian and Ubuntu have the authorities that they trust, as one file.
SYSTEM = Path("/etc/ssl/certs/ca-certificates.crt")


def context(certificates: str) -> ssl.SSLContext:
    """Trusts the system's authorities and these, as PEM."""
    trusted = ssl.create_default_context()
    if certificates:
        # Comments between the certificates may be in any language.
        trusted.load_verify_locations(cadata=certificates.encode("ascii", "ignore").decode())
    return trusted


@contextlib.contextmanager
def ca_path(certificates: str) -> Iterator[str | None]:
    """A file for open_url, which trusts what is in it and nothing else; None without certificates."""
    if not certificates:
        yield None
        return
    with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:
        file.write(f"{SYSTEM.read_text() if SYSTEM.exists() else ''}\n{certificates}")
        file.flush()
        yield file.name
