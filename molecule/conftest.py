"""The scenarios' nodes, by SSH as molecule/shared/create.yml lets its key in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import testinfra
from testinfra.host import Host


@pytest.fixture(scope="module")
def node(_testinfra_host: Host) -> str:
    """The inventory's name of the node."""
    return str(_testinfra_host.backend.host)


@pytest.fixture(scope="module")
def host(_testinfra_host: Host) -> Host:
    """Takes testinfra's place, which does not render the inventory's templates."""
    address = _testinfra_host.backend.get_variables()["ansible_host"]
    keys = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "inventory/keys"
    return testinfra.get_host(
        f"ssh://ubuntu@{address}",
        ssh_identity_file=str(keys / "id_ed25519"),
        ssh_extra_args=f"-o UserKnownHostsFile={keys}/known_hosts -o StrictHostKeyChecking=yes",
        sudo=True,
    )
