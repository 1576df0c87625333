"""From bare to serving without a way out, with real systemd, apt, Docker, nginx and vLLM."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from conftest import ADDRESSES, DISTRIBUTION, INVENTORY, MEDIA, NODE, SITE, Site
from testbed import Run


def manifest(site: Site) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((site.bundle_dir / "manifest.json").read_text())
    return found


def blobs(site: Site) -> set[str]:
    return {path.name for path in (site.bundle_dir / "blobs").glob("*/*")}


def test_a_bundle_is_made_from_the_rendered_release(site: Site, bundled: Run) -> None:
    made = manifest(site)
    paths = {item["path"] for item in made["files"]}
    assert made["image"]["path"] == "vllm/vllm-openai"
    assert f"apt/nvidia/{DISTRIBUTION}/x86_64/InRelease" in paths
    assert any(path.startswith(f"apt/system/{DISTRIBUTION}/haproxy_") for path in paths)
    assert any(path.startswith("controller/ansible_core") for path in paths)
    assert any(path.startswith("controller/glm-fleet-") for path in paths)
    assert max(path.stat().st_size for path in (site.bundle_dir / "blobs").glob("*/*")) < 2**32


def test_a_node_whose_gpus_do_not_compute_is_not_taken_into_service(site: Site, served: Run) -> None:
    """PyTorch itself sees no GPU here; disk and network are measured."""
    run = site.play(playbook="playbooks/prepare.yml", seconds=900, glm_acceptance=True)
    assert "the node is not as the others: results: PyTorch sees 0 of 8 GPUs" in run.line(f"{NODE}: ")
    record = json.loads((INVENTORY.parents[2] / f"results/airgap/acceptance/{NODE}.json").read_text())
    assert not record["ok"]
    assert record["result"]["disk"]["read_gb_s"] > 0
    assert record["result"]["network"]["download_gb_s"] > 0
    assert not site.run(NODE, "ls -A /var/lib/glm/models", check=False).strip()


def test_a_bare_node_serves_without_one_attempt_to_reach_anything_else(site: Site, deployed: Run) -> None:
    report = json.loads((INVENTORY.parents[2] / "results/airgap/report.json").read_text())
    assert report["nodes"][NODE]["ok"], report
    assert site.run(NODE, "dpkg-query -W nvidia-driver-pinning-570.211.01").strip()
    assert {host: site.attempts(host) for host in ADDRESSES} == {NODE: 0, SITE: 0}
    # Docker 26 looks its hub up at each pull, whatever mirror it has: the site's own name server says no.
    assert site.questions() <= {"docker.io"}
    # The filter does count.
    site.run(NODE, "curl -s --max-time 2 http://198.18.80.2:8080/", check=False)
    assert site.attempts(NODE) > 0


def test_a_second_run_changes_nothing(site: Site, deployed: Run) -> None:
    before = site.attempts(NODE), site.attempts(SITE)
    again = site.play(seconds=600)
    assert (again.code, again.recap("changed")) == (0, 0), again.output[-3000:]
    mirror = site.mirror()
    assert (mirror.code, mirror.recap("changed")) == (0, 0), mirror.output[-3000:]
    assert before == (site.attempts(NODE), site.attempts(SITE))


def test_a_second_bundle_fetches_only_what_is_new(site: Site, deployed: Run) -> None:
    first, before = manifest(site), blobs(site)
    base = site.bundle_dir.parent / "at-the-site.json"
    shutil.copy(site.bundle_dir / "manifest.json", base)
    run = site.bundle(glm_docker_source="distribution")
    assert run.code == 0, run.messages
    second = manifest(site)
    assert second["id"] != first["id"]
    kept = {item["sha256"] for item in second["files"]} & {item["sha256"] for item in first["files"]}
    heavy = [item for item in first["files"] if item["path"].startswith(("images/", "zai-org/"))]
    assert {item["sha256"] for item in heavy} <= kept
    assert kept <= blobs(site)
    # For a site that has the first one, only the difference is to be carried.
    other = site.bundle_dir
    site.bundle_dir = site.bundle_dir.parent / "difference"
    try:
        run = site.bundle(glm_docker_source="distribution", glm_bundle_base=str(base))
        assert run.code == 0, run.messages
        assert not blobs(site) & {item["sha256"] for item in heavy}
        site.carry()
        before_site = site.run(SITE, "readlink /srv/glm-mirror/current")
        run = site.mirror(glm_docker_source="distribution")
        assert run.code == 0, run.messages
        assert site.run(SITE, "readlink /srv/glm-mirror/current") != before_site
        run = site.play("--limit", NODE, seconds=600)
        assert "was made with glm_docker_source: distribution, and it is docker here" in run.line("mirror: ")
    finally:
        site.bundle_dir = other
    assert before  # the first one had files of its own


def test_a_bundle_that_is_not_whole_changes_nothing(site: Site, served: Run) -> None:
    site.carry()
    before = site.machine(SITE).snapshot()
    victim = next(item for item in manifest(site)["files"] if item["path"].startswith("images/"))
    part = f"{MEDIA}/blobs/{victim['sha256'][:2]}/{victim['sha256']}"
    site.run(SITE, f"rm -rf /srv/glm-mirror.away; mv /srv/glm-mirror /srv/glm-mirror.away; mv {part} {part}.away")
    try:
        run = site.mirror(glm_docker_source="distribution")
        assert f"{part} is missing or too short: bring it once more" in run.messages[0]
        site.run(SITE, f"mv {part}.away {part}; echo x >> {MEDIA}/manifest.json")
        run = site.mirror(glm_docker_source="distribution")
        assert "is not by the key in glm_mirror_key_file" in run.messages[0]
    finally:
        site.run(
            SITE, "test -e /srv/glm-mirror.away && rm -rf /srv/glm-mirror; mv /srv/glm-mirror.away /srv/glm-mirror"
        )
    assert site.machine(SITE).snapshot() == before


def test_a_damaged_file_is_named_as_it_is_brought(site: Site, served: Run) -> None:
    site.carry()
    victim = next(item for item in manifest(site)["files"] if item["path"].startswith("images/"))
    part = f"{MEDIA}/blobs/{victim['sha256'][:2]}/{victim['sha256']}"
    site.run(SITE, f"rm -rf /srv/glm-mirror && printf '\\377\\376' | dd of={part} conv=notrunc bs=1 status=none")
    run = site.mirror(glm_docker_source="distribution")
    assert f"{victim['path']} of the bundle is damaged: bring {part} once more" in run.messages[0]
    site.carry()
    run = site.mirror(glm_docker_source="distribution")
    assert run.code == 0, run.messages


def test_a_host_without_room_is_refused(site: Site, served: Run) -> None:
    site.carry()
    with site.machine(SITE).small_disk("/srv/small", "64m"):
        run = site.mirror(glm_mirror_dir="/srv/small", glm_docker_source="distribution")
        assert "glm_mirror_dir: " in run.messages[0] and " are needed in /srv/small, and " in run.messages[0]


def test_a_bundle_for_other_nodes_is_refused(site: Site, served: Run) -> None:
    site.carry()
    run = site.mirror(glm_driver_branch=580, glm_docker_source="distribution")
    assert "has driver branch 570, and glm_driver_branch is 580: set it to that of the bundle" in run.messages[0]
    run = site.mirror("-e", "mirror_host=x", glm_bundle_dir="/nowhere")
    assert "glm_bundle_dir: /nowhere/manifest.json is not there" in run.messages[0]


def test_settings_that_no_bundle_can_be_made_of(site: Site, tmp_path: Path) -> None:
    run = site.bundle(glm_bundle_dir="")
    assert "glm_bundle_dir is empty" in run.messages[0]
    run = site.bundle(glm_bundle_distributions=["ubuntu2404"])
    assert "glm_bundle_apt_sources has no ubuntu2404" in run.messages[0]
    run = site.bundle(glm_bundle_kernels=["1.2.3-none"], glm_bundle_dir=str(tmp_path / "other"))
    assert "glm_bundle_kernels: no source of glm_bundle_apt_sources has linux-headers-1.2.3-none" in run.messages[0]
    assert not list((tmp_path / "other").glob("blobs/*"))


def test_the_node_gets_its_own_sources_back(site: Site, deployed: Run) -> None:
    own = "/etc/apt/sources.list"
    assert site.run(NODE, f"ls {own} {own}.glm.disabled", check=False).split() == [f"{own}.glm.disabled"]
    run = site.play(playbook="playbooks/teardown.yml", seconds=300)
    assert run.code == 0, run.messages
    assert site.run(NODE, f"ls {own} {own}.glm.disabled", check=False).split() == [own]
    assert not site.run(NODE, "ls /etc/apt/sources.list.d/glm-mirror.sources", check=False)
