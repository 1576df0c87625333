"""The configuration of the web server by which a node offers the weights to others."""

from __future__ import annotations

from pathlib import Path

import jinja2

TEMPLATE = Path(__file__).resolve().parents[2] / "templates/weights-share.conf.j2"


def server_config(run: Path, models: Path, addresses: dict[str, str], name: str, port: int) -> str:
    template = jinja2.Environment(trim_blocks=True)
    template.filters["comment"] = lambda text: f"# {text}"
    return template.from_string(TEMPLATE.read_text()).render(
        ansible_managed="test",
        __model_weights_share_runtime=run,
        __model_weights_model_directory=models,
        model_weights_share_addresses=addresses,
        model_weights_share_name=name,
        model_weights_share_port=port,
        model_weights_share_transfers=4,
        model_weights_share_rate=0,
    )
