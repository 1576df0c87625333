"""Answers pip with the metadata that a source archive already holds.

pip asks a source archive for its metadata before it keeps it. vLLM's own build would want PyTorch and CUDA for that.
With this in front of the real setuptools no code of the archive runs.
"""

from __future__ import annotations

import email
import shutil
from pathlib import Path


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: object = None) -> str:
    metadata = email.message_from_string(Path("PKG-INFO").read_text(encoding="utf-8"))
    folder = Path(metadata_directory, f"{metadata['Name']}-{metadata['Version']}.dist-info")
    folder.mkdir()
    shutil.copy("PKG-INFO", folder / "METADATA")
    return folder.name
