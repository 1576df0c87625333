"""The configuration of the web server by which a node offers the weights and the image to others, and to its Docker."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

TEMPLATES = Path(__file__).resolve().parents[2] / "templates"


def server_config(
    run: Path,
    directory: Path,
    addresses: dict[str, str],
    name: str,
    port: int,
    *,
    registry: str = "127.0.0.1",
    images: Sequence[dict[str, Any]] = (),
) -> str:
    """`directory` has the revisions of models and images. `registry` is the address for Docker."""
    templates = jinja2.Environment(trim_blocks=True, loader=jinja2.FileSystemLoader(TEMPLATES))
    templates.filters["comment"] = lambda text: f"# {text}"
    return templates.get_template("share.conf.j2").render(
        ansible_managed="test",
        __node_share_runtime=run,
        __node_share_registry=registry,
        node_share_model_directory=directory,
        node_share_image_directory=directory,
        node_share_addresses=addresses,
        node_share_name=name,
        node_share_port=port,
        node_share_transfers=4,
        node_share_rate=0,
        node_share_images=images,
    )
