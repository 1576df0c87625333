"""A certificate by ACME: real certbot on a gateway, and pebble, the test authority of Let's Encrypt's makers."""

from __future__ import annotations

import json
import re
import ssl
import subprocess
import time
from pathlib import Path

from conftest import ADDRESS, PLAIN, Attacker, Edge

GATEWAY, NAME = "edge-gateway-2", "edge.test"
PLACE = PLAIN.removeprefix("http://").split(":")[0]
DIRECTORY = f"https://{ADDRESS}:14000/dir"
CONFIG = {
    "pebble": {
        "listenAddress": "0.0.0.0:14000",
        "managementListenAddress": "127.0.0.1:15000",
        "certificate": "/pebble/cert.pem",
        "privateKey": "/pebble/key.pem",
        "httpPort": 80,
        "tlsPort": 443,
        "ocspResponderURL": "",
    }
}


def start_authority(attacker: Attacker) -> str:
    """Its certificate."""
    attacker.run("apt-get install -y -q --no-install-recommends pebble", seconds=300)
    attacker.run(
        f"mkdir -p /pebble && cd /pebble && printf %s '{json.dumps(CONFIG)}' >config.json && echo '{PLACE} {NAME}' "
        ">>/etc/hosts && openssl req -x509 -newkey rsa:2048 -nodes -days 30 -subj /CN=authority -addext "
        f"subjectAltName=IP:{ADDRESS} -keyout key.pem -out cert.pem"
    )
    settings = "PEBBLE_WFE_NONCEREJECT=0 PEBBLE_VA_NOSLEEP=1"
    attacker.run(f"{settings} setsid pebble -config /pebble/config.json >/pebble/log 2>&1 </dev/null &")
    attacker.run(f"for _ in $(seq 60); do curl -sk {DIRECTORY} && exit; sleep 0.5; done; cat /pebble/log; exit 1")
    return attacker.run("cat /pebble/cert.pem")


def shown() -> dict[str, str]:
    """Of the certificate that the gateway shows: subject, issuer and serial number."""
    text = ssl.get_server_certificate((PLACE, 8000), timeout=10)
    command = ["openssl", "x509", "-noout", "-serial", "-issuer", "-ext", "subjectAltName"]
    said = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
    return {
        "serial": said.split("serial=")[1].split()[0],
        "issuer": said.split("issuer=")[1].splitlines()[0],
        "names": said.splitlines()[-1].strip(),
    }


def test_a_certificate_comes_and_is_renewed_without_a_run(edge: Edge, tmp_path: Path) -> None:
    fleet, gateway = edge.fleet, edge.fleet.machine(GATEWAY)
    authority = start_authority(edge.attacker)
    gateway.run("cat > /usr/local/share/ca-certificates/authority.crt && update-ca-certificates", stdin=authority)
    host = f"{GATEWAY}: {{ansible_host: {PLACE}"
    more = f', glm_acme_names: [{NAME}], glm_acme_directory: "{DIRECTORY}"'
    inventory = fleet.other_inventory(tmp_path, host, host + more)

    wrong = fleet.play(inventory=inventory, seconds=600, glm_acme_directory=f"https://{ADDRESS}:9/dir")
    assert wrong.code == 2 and f"certbot got no certificate for {NAME} from https://{ADDRESS}:9/dir" in wrong.output
    run = fleet.play(inventory=inventory, seconds=600)
    assert run.code == 0, run.messages
    first = shown()
    assert "Pebble Intermediate" in first["issuer"] and first["names"] == f"DNS:{NAME}"
    # An API by plain HTTP would show the key.
    said = edge.attacker.run(f"curl -s -w ' %{{http_code}}' http://{PLACE}/v1/models")
    assert '"code":"https_required"' in said and said.endswith(" 403")
    again = fleet.play(inventory=inventory, seconds=600)
    assert again.code == 0 and not re.search(r"changed=[1-9]", again.output), again.output[-2000:]

    begun = edge.info(GATEWAY)["Pid"]
    gateway.run("certbot renew --force-renewal --no-random-sleep-on-renew --quiet")
    deadline = time.monotonic() + 30
    while shown()["serial"] == first["serial"]:
        assert time.monotonic() < deadline
        time.sleep(1)
    assert edge.info(GATEWAY)["Pid"] != begun  # a reload, as others cut no stream
    timer = gateway.run("systemctl is-active certbot.timer", check=False).strip()
    assert timer == "active"
    edge.rows.append(("ACME, with certbot and pebble", "a certificate came, and was renewed without a run", "-"))

    back = fleet.play(seconds=600)
    assert back.code == 0, back.messages
    assert fleet.ask(PLAIN, "hello", 20, max_tokens=4) == 200
    gateway.run("test ! -e /etc/letsencrypt/renewal/glm-edge.conf && test ! -e /etc/glm/gateway/tls.pem")
