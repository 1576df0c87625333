"""The hosts of an inventory, as Ansible reads it."""

from __future__ import annotations

import io
import os
import re
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

from glm_fleet.errors import UsageProblem, one_line


@dataclass(frozen=True)
class Inventory:
    """Where an inventory is, and the hosts of the two groups that count.

    name: that of its results: its setting report_inventory_name, else its directory's.
    results: where these go: a folder of that name in its setting glm_results_dir, else in results/ where the command is
        called.
    """

    path: Path
    name: str
    results: Path
    nodes: tuple[str, ...]
    gateways: tuple[str, ...]

    def limit(self, names: tuple[str, ...]) -> str:
        """The --limit for these nodes; every gateway takes part. Empty for no limit.

        Raises UsageProblem for a name that is no node of the inventory.
        """
        for name in names:
            if name not in self.nodes:
                raise UsageProblem(
                    f"{name}: the inventory {self.path} has no such node (it has {', '.join(self.nodes)})"
                )
        return ",".join(names + self.gateways) if names else ""


def read(path: Path, vault_password_file: Path | None = None, *, empty: bool = False) -> Inventory:
    """Raises UsageProblem where it is missing, does not parse, or has no nodes; with `empty` it may have none."""
    if not path.exists():
        raise UsageProblem(f"{path}: there is no such inventory: pass one with -i, such as -i inventory/lambda")
    # Also for the run itself: Ansible goes on without a file that it cannot read.
    os.environ["ANSIBLE_INVENTORY_ANY_UNPARSED_IS_FAILED"] = "true"
    try:
        from ansible import constants  # it reads its configuration as it is imported
        from ansible.errors import AnsibleError
        from ansible.inventory.manager import InventoryManager
        from ansible.parsing.dataloader import DataLoader
        from ansible.plugins.loader import init_plugin_loader
        from ansible.utils.collection_loader import AnsibleCollectionConfig
        from ansible.vars.manager import VariableManager

        if not AnsibleCollectionConfig.collection_finder:  # an inventory plugin may be of a collection
            init_plugin_loader()
    except Exception as problem:
        raise UsageProblem(f"Ansible's configuration cannot be read: {one_line(problem)}") from problem

    loader, said = DataLoader(), io.StringIO()
    try:
        password_file = vault_password_file or constants.DEFAULT_VAULT_PASSWORD_FILE
        if password_file:
            from ansible.cli import CLI

            loader.set_vault_secrets(CLI.setup_vault_secrets(loader, [], [str(password_file)], auto_prompt=False))
        with redirect_stdout(said), redirect_stderr(said):  # what is wrong is said once, and by us
            manager = InventoryManager(loader=loader, sources=[str(path)])
            groups = manager.get_groups_dict()
    except AnsibleError as problem:
        raise UsageProblem(f"{path}: the inventory does not parse: {_cause(said.getvalue(), problem)}") from problem
    if not groups.get("nodes") and not empty:
        raise UsageProblem(f"{path}: the inventory has no host in its group nodes: add one, as inventory/lambda shows")
    directory = path if path.is_dir() else path.parent
    own: dict[str, str] = {}
    with suppress(AnsibleError), redirect_stderr(said):  # variables that are encrypted or broken: the run will tell
        first = manager.get_host(next(iter(groups.get("nodes", ())), "localhost"))
        seen = VariableManager(loader=loader, inventory=manager).get_vars(host=first)
        own = {name: str(seen.get(name, "")) for name in ("report_inventory_name", "glm_results_dir")}
        own = {name: value for name, value in own.items() if value and "{" not in value}
    name = own.get("report_inventory_name") or directory.resolve().name
    return Inventory(
        path=path.resolve(),
        name=name,
        results=Path(own.get("glm_results_dir", "results")).expanduser().resolve() / name,
        nodes=tuple(groups.get("nodes", ())),
        gateways=tuple(groups.get("gateways", ())),
    )


def _cause(said: str, problem: Exception) -> str:
    """What the first parser that fits the file has against it, in one line."""
    found = re.search(r"<<< caused by >>>\s*(.*?)(?:\nOrigin: <inventory plugin|\n\n|\Z)", said, re.S)
    return one_line(found[1] if found else problem)
