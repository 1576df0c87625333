"""A bare node whose only way out is a real proxy, with mirrors whose certificates a private authority has signed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import IMAGES
from fleet import Fleet, provided
from machines import Machine
from testbed import ROOT, Play

INVENTORY = ROOT / "molecule/node-life/shut"
NODE, EDGE, MIRROR = "shut-1", "http://198.18.74.10:8000", "198.18.74.2"
PROXY = f"http://{MIRROR}:3128"
NOBODY = "http://198.18.74.99:9"
LOG = "/var/log/tinyproxy/tinyproxy.log"
TINYPROXY = f"""User tinyproxy
Group tinyproxy
Port 3128
Timeout 600
LogFile "{LOG}"
LogLevel Connect
MaxClients 100
"""
# Registry and hub behind HTTPS.
NGINX = """ssl_certificate /etc/private/mirror.crt;
ssl_certificate_key /etc/private/mirror.key;
client_max_body_size 0;
proxy_set_header Host $http_host;
proxy_set_header X-Forwarded-Proto https;
server { listen 8443 ssl; location / { proxy_pass http://127.0.0.1:8081; proxy_buffering off; } }
server { listen 5443 ssl; location / { proxy_pass http://127.0.0.1:5000; proxy_buffering off; } }
"""
CERTIFICATES = f"""set -e
apt-get update -q
DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends openssl
mkdir -p /etc/private && cd /etc/private
openssl req -x509 -newkey rsa:2048 -nodes -days 30 -subj '/CN=Private authority' -keyout ca.key -out ca.crt \
  -addext keyUsage=critical,keyCertSign,cRLSign
openssl req -newkey rsa:2048 -nodes -subj '/CN=mirror' -keyout mirror.key -out mirror.csr
printf 'subjectAltName=IP:{MIRROR}\\nauthorityKeyIdentifier=keyid\\nsubjectKeyIdentifier=hash\\n' > san
openssl x509 -req -in mirror.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 30 -extfile san -out mirror.crt
"""
# What the node itself opens goes to the proxy or nowhere; SSH comes in.
SHUT = f"""set -e
apt-get update -q
DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends iptables
iptables -A OUTPUT -o lo -j ACCEPT
iptables -A OUTPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
iptables -A OUTPUT -d {MIRROR} -p tcp --dport 3128 -j ACCEPT
iptables -A OUTPUT -j REJECT
"""


@dataclass
class Shut:
    """The node, its mirror and the settings that open the way."""

    fleet: Fleet
    node: Machine
    mirror: Machine
    ca_file: Path

    @property
    def settings(self) -> dict[str, str]:
        return {"glm_http_proxy": PROXY, "glm_ca_file": str(self.ca_file)}

    def asked(self) -> str:
        """What the proxy was asked for."""
        return self.mirror.run(f"cat {LOG}")


@pytest.fixture(scope="module")
def shut(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shut]:
    scratch = tmp_path_factory.mktemp("shut")
    fleet = Fleet(Play(scratch, INVENTORY), (NODE,), {NODE: EDGE})
    with provided(fleet, "LIFE_KEEP", IMAGES):
        mirror, node = Machine("glm-node-life-shut-mirror"), Machine(f"glm-{NODE}")
        mirror.run(CERTIFICATES)
        mirror.run("cat > /etc/nginx/conf.d/private.conf", stdin=NGINX)
        mirror.run("systemctl restart nginx")
        # Its package starts it before it is configured.
        mirror.run("mkdir -p /etc/tinyproxy && cat > /etc/tinyproxy/tinyproxy.conf", stdin=TINYPROXY)
        install = "apt-get install -y -q --no-install-recommends -o Dpkg::Options::=--force-confold tinyproxy"
        mirror.run(f"DEBIAN_FRONTEND=noninteractive {install} && systemctl restart tinyproxy")
        node.run(SHUT)
        ca_file = scratch / "ca.pem"
        ca_file.write_text(mirror.run("cat /etc/private/ca.crt"))
        # The proxies of root's Docker client would go into each container that it starts.
        config = {"proxies": {"default": {"httpProxy": NOBODY, "httpsProxy": NOBODY}}}
        node.run("mkdir -p /root/.docker && cat > /root/.docker/config.json", stdin=json.dumps(config))
        yield Shut(fleet, node, mirror, ca_file)


def test_what_cannot_be_reached_is_refused_before_anything_changes(shut: Shut) -> None:
    before = shut.node.snapshot()
    run = shut.fleet.play(seconds=200)
    assert run.code == 2
    assert {"registry", "hub", "docker_packages", "toolkit_packages"} <= set(run.findings())
    assert shut.node.snapshot() == before


def test_a_proxy_without_the_authority_is_not_enough(shut: Shut) -> None:
    run = shut.fleet.play(seconds=200, glm_http_proxy=PROXY)
    assert run.code == 2
    assert "the certificate is not trusted" in run.line("hub:")


def test_the_node_is_deployed_by_the_proxy_alone_and_loopback_never_goes_by_it(shut: Shut) -> None:
    run = shut.fleet.play(seconds=900, glm_benchmark="quick", **shut.settings)
    assert run.code == 0, run.messages
    assert shut.fleet.ask(EDGE, "hello", 30, max_tokens=4) == 200
    asked = shut.asked()
    for port in (5443, 8443, 8080):
        assert f"{MIRROR}:{port}" in asked, port
    for loopback in ("127.0.0.1", "localhost"):
        assert loopback not in asked
    environment = shut.node.run("docker inspect glm-engine --format '{{json .Config.Env}}'")
    assert NOBODY not in environment


def test_a_second_run_changes_nothing(shut: Shut) -> None:
    run = shut.fleet.play(seconds=300, **shut.settings)
    assert run.code == 0, run.messages
    assert run.recap("changed") == 0
