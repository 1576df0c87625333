"""Nodes that bring the image and the weights together, with real systemd, nginx, Docker and the hub's client."""

from __future__ import annotations

import json
import re
import signal
import time
from collections import Counter

from conftest import ADDRESSES, FIRST, IMAGE_DIRECTORY, MODEL, NEW, Sharing
from machines import Machine
from testbed import ROOT, Run, docker

CHECKPOINT = ROOT / "molecule/shared/model/checkpoint"
SHARD = "model-00002-of-00004.safetensors"
SHARED = r"shared: (\d+) of \1 files, ([\d.]+ k?M?B) from the hub, ([\d.]+ k?M?B) from peers"
SERVER = "systemctl is-active glm-share.service"
SETTINGS = "cat /etc/glm/share.conf /etc/systemd/system/glm-share.service; grep 127.0.0.1 /etc/docker/daemon.json"
MIRRORS = "docker info --format '{{ .RegistryConfig.Mirrors }}'"


def pulled(fleet: Sharing, node: str) -> str:
    """What the last pull said."""
    return fleet.journal(node, 12, "glm-image-pull")


def test_three_bare_nodes_ask_the_hub_for_each_file_once(fleet: Sharing, prepared: tuple[Run, Counter[str]]) -> None:
    _, asked = prepared
    checkpoint = {path.name: path.stat().st_size for path in CHECKPOINT.glob("[!.]*")}
    assert asked == Counter(checkpoint.keys())
    total = sum(checkpoint.values())
    came = [json.loads(fleet.run(node, "cat /run/glm-weights/result.json")) for node in FIRST]
    assert [each["bytes"] for each in came] == [total] * 3
    assert sum(each["sources"].get("hub", 0) for each in came) == total
    assert sum(each["sources"].get("peers", 0) for each in came) == 2 * total
    assert fleet.files(FIRST[0]) == fleet.files(FIRST[1]) == fleet.files(FIRST[2])
    for node in FIRST:
        assert re.search(SHARED, fleet.journal(node)), fleet.journal(node)
        assert not fleet.run(node, "find /var/lib/glm/models -name .glm-offer").strip()


def test_three_bare_nodes_take_each_layer_of_the_image_from_the_registry_once(fleet: Sharing, prepared: object) -> None:
    image = fleet.image(FIRST[0])
    assert fleet.layers_since(Counter()) == Counter(image.layers) and len(set(image.layers)) == len(image.layers)
    for node in FIRST:
        (directory,) = fleet.run(node, f"ls {IMAGE_DIRECTORY}").split()
        assert fleet.image(node) == ([f"vllm/vllm-openai@sha256:{directory}"], image.configuration, image.layers)
        assert re.search(r"complete: \d+ blobs, .* from the registry, .* from peers", pulled(fleet, node))
    # The first one had less than all of it, and so had each of the others.
    assert not any(", 0 B from" in pulled(fleet, node) for node in FIRST)


def test_a_second_run_changes_nothing(fleet: Sharing, prepared: object) -> None:
    before = fleet.mirror.downloads()
    again = fleet.prepare(*FIRST)
    assert (again.code, again.recap("changed")) == (0, 0)
    assert not fleet.asked_since(before)


def test_the_server_is_closed_to_all_but_the_fleet(fleet: Sharing, prepared: object) -> None:
    url = f"http://{ADDRESSES[FIRST[0]]}:8004/{'1' * 40}"
    code = "curl -so /dev/null -w '%{http_code}'"
    assert fleet.run(FIRST[1], f"{code} {url}/state") == "200"
    assert fleet.run(FIRST[1], f"{code} {url}/files/{SHARD}") == "200"
    assert fleet.run(FIRST[1], f"{code} {url}/../../../../etc/glm/weights.json --path-as-is") in ("400", "403", "404")
    assert docker("exec", fleet.mirror.container, "sh", "-c", f"{code} {url}/state") == "403"
    exposure = fleet.run(FIRST[0], "systemd-analyze security --no-pager glm-share.service | tail -1")
    score = re.search(r"glm-share.service: ([\d.]+)", exposure)
    assert score and float(score[1]) <= 3.5, exposure
    assert fleet.run(FIRST[0], "systemctl is-enabled nginx.service", check=False).strip() in ("disabled", "masked")


def test_a_node_that_joins_asks_hub_and_registry_for_nothing(fleet: Sharing, prepared: object) -> None:
    before, blobs = fleet.mirror.downloads(), fleet.mirror.blobs()
    run = fleet.prepare(seconds=900)
    assert run.code == 0, run.messages
    assert not fleet.asked_since(before) and not fleet.layers_since(blobs)
    assert fleet.files(NEW) == fleet.files(FIRST[0])
    assert fleet.image(NEW) == fleet.image(FIRST[0])


def test_a_peer_with_a_flipped_byte_is_named(fleet: Sharing, prepared: object) -> None:
    """All three have the same wrong file: what no peer has right comes from the hub."""
    good = fleet.run(FIRST[0], f"sha256sum {MODEL}/{SHARD}").split()[0]
    for node in FIRST:
        fleet.flip(node, f"{MODEL}/{SHARD}")
    fleet.forget(NEW)
    before = fleet.mirror.downloads()
    try:
        run = fleet.prepare()
        assert run.code == 0, run.messages
        assert fleet.asked_since(before) == Counter([SHARD])
        journal = fleet.journal(NEW)
        assert f"gave a wrong {SHARD} (expected sha256 {good}, found " in journal
        assert re.search(r"peer weights-[123] \(198\.18\.79\.1[123]\) gave a wrong", journal)
        assert fleet.run(NEW, f"sha256sum {MODEL}/{SHARD}").split()[0] == good
    finally:
        for node in FIRST:
            fleet.flip(node, f"{MODEL}/{SHARD}")


def test_a_peer_with_a_flipped_byte_in_a_layer_is_named(fleet: Sharing, prepared: object) -> None:
    image = fleet.image(FIRST[0])
    layer = image.layers[1]
    path = f"{IMAGE_DIRECTORY}/{image.names[0].rpartition(':')[2]}/{layer.replace(':', '/')}"
    for node in FIRST:
        fleet.flip(node, path)
    fleet.forget_image(NEW)
    blobs = fleet.mirror.blobs()
    try:
        run = fleet.prepare()
        assert run.code == 0, run.messages
        assert fleet.layers_since(blobs) == Counter([layer])
        wrong = rf"peer weights-[123] \(198\.18\.79\.1[123]\) gave a wrong sha256/{layer[7:]} \(expected sha256 "
        assert re.search(wrong, pulled(fleet, NEW))
        assert fleet.image(NEW) == image
    finally:
        for node in FIRST:
            fleet.flip(node, path)


def test_a_node_without_room_for_the_blobs_pulls_from_the_registry(fleet: Sharing, prepared: object) -> None:
    fleet.forget_image(NEW)
    fleet.run(NEW, f"mkdir -p {IMAGE_DIRECTORY} && mount -t tmpfs -o size=1m tmpfs {IMAGE_DIRECTORY}")
    blobs = fleet.mirror.blobs()
    try:
        run = fleet.prepare()
        assert run.code == 0, run.messages
        assert f"no space left in {IMAGE_DIRECTORY} for the image's blobs" in pulled(fleet, NEW)
        assert fleet.layers_since(blobs) == Counter(fleet.image(FIRST[0]).layers)
        assert fleet.image(NEW) == fleet.image(FIRST[0])
    finally:
        fleet.run(NEW, f"umount {IMAGE_DIRECTORY}")


def test_the_others_take_over_from_a_node_that_is_lost(fleet: Sharing, prepared: object) -> None:
    """It is off in the middle; then it is back, and takes the rest from those that have it."""
    fleet.forget(*ADDRESSES)
    lost = Machine(f"glm-{FIRST[2]}")
    before = fleet.mirror.downloads()
    with fleet.mirror.hub(bytes_per_second=60_000):
        run = fleet.begin("playbooks/prepare.yml")
        try:
            began = f"ls {MODEL}.partial/.cache/huggingface/download/*.incomplete"
            fleet.wait(lambda: lost.run(began, check=False), 240)
            docker("kill", lost.container)
            for node in (*FIRST[:2], NEW):
                fleet.wait(lambda node=node: fleet.complete(node), 240)  # type: ignore[misc]
        finally:
            run.send_signal(signal.SIGTERM)
            run.communicate(timeout=120)
            docker("start", lost.container)
    asked = fleet.asked_since(before)
    # What it had begun to bring is asked for a second time.
    assert max(asked.values()) <= 2 and sum(asked.values()) < 2 * len(asked)
    before = fleet.mirror.downloads()
    fleet.wait(lambda: lost.run("systemctl is-system-running", check=False).strip() in ("running", "degraded"), 180)
    fleet.wait(lambda: lost.run(SERVER, check=False).strip() == "active", 60)
    back = fleet.prepare()
    assert back.code == 0, back.messages
    assert not fleet.asked_since(before)
    assert fleet.files(FIRST[2]) == fleet.files(FIRST[0])


def test_a_run_that_is_cut_off_goes_on(fleet: Sharing, prepared: object) -> None:
    """The controller dies in the middle: the nodes go on, and the next run finds what they did."""
    fleet.forget(*ADDRESSES)
    before = fleet.mirror.downloads()
    with fleet.mirror.hub(bytes_per_second=60_000):
        fleet.kill_at("Download and check the files", "playbooks/prepare.yml")
        fleet.wait(lambda: all(fleet.complete(node) for node in ADDRESSES), 300)
    run = fleet.prepare()
    assert run.code == 0, run.messages
    assert set(fleet.asked_since(before).values()) == {1}


def test_without_the_hub_what_no_peer_has_is_one_line(fleet: Sharing, prepared: object) -> None:
    shard = f"{MODEL}/{SHARD}"
    for node in ADDRESSES:
        fleet.run(node, f"test {node} = {NEW} || mv {shard} {shard}.away")
    fleet.forget(NEW)
    began = time.monotonic()
    try:
        with fleet.mirror.hub(file=503):
            run = fleet.prepare(seconds=400, model_weights_attempts=2)
        assert run.code != 0
        lines = [line for line in run.messages if "could not be downloaded" in line]
        assert len(lines) == len(ADDRESSES), run.messages
        assert all(f"1 of 1 files could not be downloaded, first {SHARD}: the hub at" in line for line in lines), lines
        print(f"said after {time.monotonic() - began:.0f} s")
    finally:
        for node in FIRST:
            fleet.run(node, f"mv {shard}.away {shard}")
    back = fleet.prepare()
    assert back.code == 0, back.messages


def test_it_is_taken_back_by_the_setting_and_by_teardown(fleet: Sharing, prepared: object) -> None:
    assert fleet.run(NEW, SERVER).strip() == "active"
    run = fleet.prepare(glm_share=False)
    assert run.code == 0, run.messages
    for node in ADDRESSES:
        assert fleet.run(node, SERVER, check=False).strip() == "inactive"
        assert fleet.run(node, SETTINGS, check=False) == ""
        assert fleet.run(node, f"ls -d {IMAGE_DIRECTORY} /etc/glm/image.json", check=False) == ""
        assert "127.0.0.1" not in fleet.run(node, MIRRORS)
    run = fleet.prepare()
    assert run.code == 0 and fleet.run(NEW, SERVER).strip() == "active"
    assert "127.0.0.1:8004" in fleet.run(NEW, MIRRORS)
    down = fleet.play("--limit", NEW, playbook="playbooks/teardown.yml", seconds=400)
    assert down.code == 0, down.messages
    assert fleet.run(NEW, SERVER, check=False).strip() == "inactive"
    assert fleet.run(NEW, SETTINGS, check=False) == ""
    assert "127.0.0.1" not in fleet.run(NEW, MIRRORS)
    assert fleet.run(NEW, f"ls -d {IMAGE_DIRECTORY}", check=False) == ""
