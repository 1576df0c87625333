"""What Prometheus is to scrape, and whether the monitoring's settings can be used."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ansible_collections.glm.fleet.plugins.module_utils.glm_node.systemd import human
from ansible_collections.glm.fleet.plugins.plugin_utils.edges import edge_of

INTERVAL = 15  # seconds between two scrapes
# Series of one target, with room above those of tests/fixtures/metrics: a node exporter has ten for each core.
SERIES = {"engine": 700, "haproxy": 1000, "node": 3000, "gpu": 600}
SERIES_OF_A_SERVER = 100  # of a gateway's HAProxy, for each node behind it
BYTES_OF_A_SAMPLE = 2
RESERVE = 1 << 30  # the write-ahead log, and blocks that are made of smaller ones


def scrape_targets(
    hostvars: Mapping[str, Mapping[str, Any]],
    nodes: Sequence[str],
    gateways: Sequence[str],
    defaults: Mapping[str, Any],
) -> dict[str, list[dict[str, Any]]]:
    """By job, the targets as Prometheus reads them from a file; defaults: port, engine, profile, gpu."""
    jobs: dict[str, list[dict[str, Any]]] = {job: [] for job in SERIES}
    for name in [*nodes, *gateways]:
        settings = hostvars[name]
        address = str(edge_of(name, settings)["address"])
        port = settings.get("glm_metrics_port") or defaults["port"]
        labels = {"instance": name, "role": "node" if name in nodes else "gateway"}
        if name in nodes:
            labels |= {
                "engine": str(settings.get("glm_engine") or defaults["engine"]),
                "profile": str(settings.get("glm_profile") or defaults["profile"]),
            }
        has = {
            "engine": name in nodes,
            "haproxy": True,
            "node": True,
            "gpu": name in nodes and bool(settings.get("glm_dcgm_exporter_image", defaults["gpu"])),
        }
        target = {"targets": [f"[{address}]:{port}" if ":" in address else f"{address}:{port}"], "labels": labels}
        for job in (job for job, there in has.items() if there):
            jobs[job].append(target)
    return jobs


def series_of(targets: Mapping[str, Sequence[Any]]) -> int:
    nodes = len(targets["engine"])
    gateways = len(targets["haproxy"]) - nodes
    return sum(SERIES[job] * len(found) for job, found in targets.items()) + gateways * nodes * SERIES_OF_A_SERVER


def monitoring_problems(settings: Mapping[str, Any], host: str, served: Iterable[str]) -> list[str]:
    """A line for each setting that cannot be used.

    settings: days, gib, bind_address, webhook_url, email and token_file of the role.
    """
    found = []
    if host in served:
        found.append(
            "this host watches the nodes, and cannot be one of them: take it out of the group monitoring, or out of "
            "nodes and gateways"
        )
    if settings["days"] < 1:
        found.append(f"glm_monitoring_retention_days: {settings['days']} is no number of days: set 1 or more")
    if settings["gib"] < 0:
        found.append(f"glm_monitoring_retention_gib: {settings['gib']} is no size: set 0 for none, or GiB")
    try:
        ipaddress.ip_address(settings["bind_address"])
    except ValueError:
        found.append(
            f"glm_monitoring_bind_address: {settings['bind_address']} is no IP address: set one of "
            "this host, or 0.0.0.0"
        )
    if not Path(settings["token_file"]).is_file():
        found.append(
            f"glm_metrics_token_file: there is no file {settings['token_file']} on the controller: run site.yml first, "
            "which makes it and brings it to the nodes"
        )
    return [*found, *_receiver_problems(settings)]


def _receiver_problems(settings: Mapping[str, Any]) -> list[str]:
    found = []
    if settings["webhook_url"] and not _is_url(settings["webhook_url"]):
        # It may hold a secret: it is not shown.
        found.append("glm_alert_webhook_url: this is no URL: write http://HOST/PATH or https://HOST/PATH")
    email = settings["email"]
    if email["to"] and not re.fullmatch(r"[^\s:]+:\d{1,5}", email["smtp"]):
        found.append(f"glm_alert_smtp: '{email['smtp']}' is no mail server: write HOST:PORT")
    if email["to"] and "@" not in email["from"]:
        found.append(f"glm_alert_email_from: '{email['from']}' is no address: set the sender of the mails")
    if email["user"] and not Path(email["password_file"]).is_file():
        found.append(
            f"glm_alert_smtp_password_file: there is no file '{email['password_file']}' on the controller: "
            "glm_alert_smtp_user needs one"
        )
    return found


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and not re.search(r"\s", text)
    except ValueError:
        return False


def monitoring_findings(
    seen: Mapping[str, Any],
    settings: Mapping[str, Any],
    targets: Mapping[str, Sequence[Any]],
    rules: Iterable[Mapping[str, str]],
) -> list[str]:
    """A line for each thing on the host that stands in the way. seen: of M(glm.fleet.monitoring_info)."""
    found = [
        f"{path} is the site's own: set glm_monitoring_files to a directory on the controller, and let the site's "
        "Prometheus read it; or move the file away"
        for path in seen["foreign"]
    ]
    series = series_of(targets)
    needed = series * 86400 // INTERVAL * BYTES_OF_A_SAMPLE * settings["days"] + RESERVE
    if settings["gib"]:
        needed = min(needed, (settings["gib"] << 30) + RESERVE)
    room = seen["free"] + seen["used"]
    if needed > room:
        found.append(
            f"glm_monitoring_retention_days: {settings['days']} days of about {series:,} series need {human(needed)}, "
            f"and {seen['directory']} has {human(room)}: set fewer days, or glm_monitoring_retention_gib to what "
            "Prometheus may take"
        )
    return found + twice(rule_names(seen["rule_files"]), rule_names(rules))


def twice(theirs: Iterable[Mapping[str, Any]], ours: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each group or alert that the site's rules have, too."""
    ours = list(ours)
    names = {kind: {name for file in ours for name in file[f"{kind}s"]} for kind in ("group", "alert")}
    return [
        f"{file['path']} defines the {kind} {name} too: rename or remove it there"
        for file in theirs
        for kind in ("group", "alert")
        for name in sorted(names[kind] & set(file[f"{kind}s"]))
    ]


def rule_names(files: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """The groups and alerts of rule files, each with its path and content."""
    return [
        {
            "path": file["path"],
            "groups": re.findall(r"^\s*-?\s*name:\s*[\"']?([^\s\"'#]+)", file["content"], re.M),
            "alerts": re.findall(r"^\s*-?\s*alert:\s*[\"']?([^\s\"'#]+)", file["content"], re.M),
        }
        for file in files
    ]


def files_of(directory: str, target: str) -> list[dict[str, str]]:
    """The files of a directory as M(glm.fleet.file_set) takes them, for another place."""
    return [
        {"path": f"{target}/{path.name}", "content": path.read_text(encoding="utf-8")}
        for path in sorted(Path(directory).glob("*"))
    ]


def target_files(targets: Mapping[str, Any], directory: str) -> list[dict[str, str]]:
    """A file of targets for each job; an empty one where there are none, so that a target can go."""
    return [
        {"path": f"{directory}/{job}.json", "content": json.dumps(found, indent=1)} for job, found in targets.items()
    ]


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "scrape_targets": scrape_targets,
            "monitoring_problems": monitoring_problems,
            "monitoring_findings": monitoring_findings,
            "files_of": files_of,
            "target_files": target_files,
        }
