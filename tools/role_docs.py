#!/usr/bin/env python3
"""Writes each role's README.md, and docs/variables.md, from the roles' argument specs and defaults.

The table of Xids in docs/gpu-errors.md is made from plugins/plugin_utils/xids.py.

tools/role_docs.py            writes them
tools/role_docs.py --check    writes nothing; names the files that are stale and exits 1
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import jinja2
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "collections"))
from ansible_collections.glm.fleet.plugins.filter import names  # noqa: E402
from ansible_collections.glm.fleet.plugins.plugin_utils.xids import XIDS  # noqa: E402

FIRST = "glm"  # the user's settings

TABLE = """\
{% macro table(options) -%}
| variable | type | default | meaning |
|---|---|---|---|
{% for option in options -%}
| `{{ option.name }}` | {{ option.type }} | {{ option.default }} | {{ option.meaning }} |
{% endfor -%}
{% endmacro -%}
"""

README = (
    TABLE
    + """\
<!-- Made by tools/role_docs.py from meta/argument_specs.yml and defaults/main.yml: edit those. -->
# Role {{ role.name }}

{{ role.description }}.
{% for entry in role.entries %}

## {{ 'What it does' if entry.name == 'main' else 'tasks_from: ' ~ entry.name }}

{% if entry.name != 'main' %}
{{ entry.title }}.

{% endif %}
{% for line in entry.description %}
- {{ line }}
{% endfor %}
{% if entry.options %}

{{ table(entry.options) }}
{%- endif %}
{% endfor %}
{% if role.facts %}

## Facts that it leaves for other roles

| fact | type | meaning |
|---|---|---|
{% for name, fact in role.facts.items() %}
| `{{ name }}` | {{ fact.type }} | {{ fact.description }} |
{% endfor %}
{% endif %}
"""
)

VARIABLES = (
    TABLE
    + """\
<!-- Made by tools/role_docs.py from the roles' argument specs and defaults: edit those. -->
# Variables

What a user sets comes first: the `glm_` variables, in the inventory. roles/glm/vars/main.yml maps them onto the
variables of the roles, which follow. Those that are marked "Set by" cannot be set in an inventory, and a run refuses
them; the others can.
{% for role in roles %}

## {{ role.name }}

{{ role.description }}.
{% for entry in role.entries if entry.options %}

{% if entry.name != 'main' %}
tasks_from `{{ entry.name }}`: {{ entry.title }}.

{% endif %}
{{ table(entry.options) }}
{%- endfor %}
{% endfor %}
"""
)

XIDS_BEGIN = "<!-- Made by tools/role_docs.py from plugins/plugin_utils/xids.py: edit that. -->\n"
XIDS_END = "<!-- End of what tools/role_docs.py makes. -->\n"


def load(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    with path.open(encoding="utf-8") as stream:  # a stream, so that an error names the file
        return yaml.safe_load(stream) or {}


def lines(text: str | list[str] | None) -> list[str]:
    """A description as Markdown lines; Ansible's C(x), V(x) and O(x) are code."""
    found = [text] if isinstance(text, str) else text or []
    return [re.sub(r"\b[CVOE]\(([^()]*)\)", r"`\1`", re.sub(r"\s+", " ", line)).strip() for line in found]


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def options(spec: dict[str, Any], defaults: dict[str, Any], prefix: str = "") -> list[dict[str, str]]:
    """The rows of a table; those of a dictionary's own options follow it."""
    rows = []
    for name, option in spec.items():
        kind = option.get("type", "str")
        if "elements" in option:
            kind += f" of {option['elements']}"
        if option.get("required"):
            default = "required"
        elif prefix or name not in defaults:
            default = f"`{json.dumps(option['default'], ensure_ascii=False)}`" if "default" in option else ""
        else:
            default = f"`{json.dumps(defaults[name], ensure_ascii=False)}`"
        meaning = lines(option.get("description"))
        if "choices" in option:
            meaning.append("One of " + ", ".join(f"`{choice}`" for choice in option["choices"]) + ".")
        row = {"name": prefix + name, "type": kind, "default": cell(default), "meaning": cell(" ".join(meaning))}
        rows += [row, *options(option.get("options", {}), {}, f"{prefix}{name}.")]
    return rows


def mapped(root: Path) -> dict[str, list[str]]:
    """Which options of roles the project sets by itself, each with the user's settings that it comes from."""
    if not (root / "roles/glm/vars/main.yml").exists():
        return {}
    found: dict[str, list[str]] = names.variables_of_roles(str(root / "roles"))["mapped"]
    return found


def mark(role: dict[str, Any], origins: dict[str, list[str]]) -> dict[str, Any]:
    """The role, its options that no inventory can set marked as such."""
    for option in (option for entry in role["entries"] for option in entry["options"]):
        if option["name"] in origins:
            settings = ", ".join(f"`{name}`" for name in origins[option["name"]])
            option["meaning"] += f" Set by {settings}." if settings else " Set by the project."
    return role


def read_role(directory: Path) -> dict[str, Any]:
    defaults = load(directory / "defaults" / "main.yml")
    entries = load(directory / "meta" / "argument_specs.yml").get("argument_specs", {})
    ordered = sorted(entries.items(), key=lambda item: (item[0] != "main", item[0]))
    return {
        "name": directory.name,
        "description": load(directory / "meta" / "main.yml")["galaxy_info"]["description"].rstrip("."),
        "facts": load(directory / "meta" / "facts.yml"),
        "entries": [
            {
                "name": name,
                "title": entry.get("short_description", "").rstrip("."),
                "description": lines(entry.get("description")),
                "options": options(entry.get("options") or {}, defaults),
            }
            for name, entry in ordered
        ],
    }


def render(template: str, **values: Any) -> str:
    environment = jinja2.Environment(  # noqa: S701  (Markdown, from our own files)
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    text = environment.from_string(template).render(**values)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def xid_table() -> str:
    rows = [("code", "meaning", "what preflight does", "what to do"), ("---",) * 4]
    rows += [(str(code), kind.meaning, kind.action, kind.cure) for code, kind in XIDS.items()]
    return "".join(f"| {' | '.join(cell(column) for column in row)} |\n" for row in rows)


def with_xid_table(page: str) -> str:
    before, _begin, rest = page.partition(XIDS_BEGIN)
    _table, _end, after = rest.partition(XIDS_END)
    return f"{before}{XIDS_BEGIN}\n{xid_table()}\n{XIDS_END}{after}"


def documents(root: Path) -> dict[Path, str]:
    """Every generated file and what belongs into it."""
    found = [path.parents[1] for path in root.glob("roles/*/meta/argument_specs.yml")]
    origins = mapped(root)
    ordered = sorted(found, key=lambda path: (path.name != FIRST, path.name))
    roles = [mark(read_role(path), origins) for path in ordered]
    texts = {root / "roles" / role["name"] / "README.md": render(README, role=role) for role in roles}
    texts[root / "docs" / "variables.md"] = render(VARIABLES, roles=roles)
    errors = root / "docs" / "gpu-errors.md"
    if errors.exists():
        texts[errors] = with_xid_table(errors.read_text(encoding="utf-8"))
    return texts


def stale(root: Path) -> list[Path]:
    return [
        path.relative_to(root)
        for path, text in documents(root).items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]


def write_or_check(root: Path, check: bool) -> int:
    if check:
        late = stale(root)
        for path in late:
            print(f"{path} is stale: run tools/role_docs.py", file=sys.stderr)
        return 1 if late else 0
    for path, text in documents(root).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes the roles' README files and docs/variables.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is stale")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        return write_or_check(arguments.root, arguments.check)
    except (yaml.YAMLError, KeyError) as error:
        print(f"role_docs: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
