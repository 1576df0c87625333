"""The controller's checks of API keys and certificates, run by a real ansible-playbook without a node."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.glm.fleet.plugins.action import api_keys, tls_certificate
from certificates import pem
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
)

# Of each there is a module too, for its documentation.

ROOT = Path(__file__).resolve().parents[2]
KEY, OTHER_KEY = "sk-glm-" + "k" * 43, "sk-glm-" + "o" * 43


def test_keys_are_read_between_comments_and_blanks() -> None:
    assert api_keys.parse(f"# mine\n\n{KEY}\n  {OTHER_KEY}  \n", "F") == [KEY, OTHER_KEY]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "F holds no key: put one a line in it, or delete it to have one made"),
        ("# nothing\n\n", "F holds no key"),
        ("short\n", "F, line 1: not an API key"),
        (f"{KEY}\n{KEY} # me\n", "F, line 2: not an API key"),
        (f"# mine\n{KEY}\n{OTHER_KEY}\n{KEY}\n", "F, line 4: the same key as in line 2"),
        (f"{KEY}\u00e9\n", "F, line 1: not an API key"),
    ],
)
def test_wrong_files_are_refused_in_one_line_without_a_key(text: str, message: str) -> None:
    with pytest.raises(api_keys.Refused) as refused:
        api_keys.parse(text, "F")
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert KEY not in str(refused.value)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_a_file_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "keys"
    path.write_text(KEY)
    path.chmod(mode)
    with pytest.raises(api_keys.Refused, match="chmod 600"):
        api_keys.check_private(str(path))


def test_a_made_key_is_private_random_and_valid(tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        path = tmp_path / "keys" / name
        api_keys.generate(str(path))
        assert path.stat().st_mode & 0o777 == 0o600
        made += api_keys.parse(path.read_text(), str(path))
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700
    assert made[0] != made[1] and all(len(key) == 50 and key.startswith("sk-glm-") for key in made)


def run_task(task: dict[str, Any], *options: str, directory: Path) -> dict[str, Any]:
    """The task's result, as the project's configuration runs it."""
    play = [
        {
            "hosts": "localhost",
            "gather_facts": False,
            "tasks": [
                {**task, "register": "result", "failed_when": False},
                {"ansible.builtin.debug": {"msg": "{{ {'answer': result} | to_json }}"}},
            ],
        }
    ]
    book = directory / "play.json"
    book.write_text(json.dumps(play))
    environment = {
        **os.environ,
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_STDOUT_CALLBACK": "ansible.builtin.default",
        "ANSIBLE_CALLBACK_RESULT_FORMAT": "json",
    }
    program = Path(sys.executable).with_name("ansible-playbook")
    done = subprocess.run(
        [program, "-i", "localhost,", "-vvv", book, *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = done.stdout[done.stdout.rindex('"msg": ') + 7 :]
    answer = json.JSONDecoder().raw_decode(text)[0]
    value: dict[str, Any] = (json.loads(answer) if isinstance(answer, str) else answer)["answer"]
    return {**value, "output": done.stdout + done.stderr}


def test_the_plugin_makes_keys_once_and_shows_none(tmp_path: Path) -> None:
    path = tmp_path / "keys/api-keys.txt"
    task = {"glm.fleet.api_keys": {"path": str(path), "generate": True}}

    promised = run_task(task, "--check", directory=tmp_path)
    assert promised["changed"] and promised["digests"] == [] and not path.exists()

    first = run_task(task, directory=tmp_path)
    key = path.read_text().splitlines()[-1]
    assert first["changed"] and first["digests"] == [hashlib.sha256(key.encode()).hexdigest()]

    second = run_task(task, "--check", directory=tmp_path)
    assert not second["changed"] and second["digests"] == first["digests"]
    assert key not in promised["output"] + first["output"] + second["output"]


def test_the_plugin_says_what_to_do_about_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "absent"
    result = run_task({"glm.fleet.api_keys": {"path": str(path)}}, directory=tmp_path)
    assert result["msg"] == f"{path} does not exist: site.yml makes it, or put one key a line in it"


def test_a_good_certificate_passes_in_either_order() -> None:
    certificate, key = pem()
    for text in (certificate + key, key + certificate, certificate + pem()[0] + key):
        assert tls_certificate.check(text.encode(), 0o600, "F") > datetime.datetime.now(datetime.timezone.utc)


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        ("".join(pem()), 0o644, "chmod 600 F"),
        ("", 0o600, "F holds no PEM certificate"),
        ("-----BEGIN CERTIFICATE-----\noops\n-----END CERTIFICATE-----\n", 0o600, "F holds no PEM certificate"),
        (pem()[0], 0o600, "F holds no PEM private key"),
        (pem()[1], 0o600, "F holds no PEM certificate"),
        ("".join(pem(encryption=BestAvailableEncryption(b"secret"))), 0o600, "encrypted"),
        ("".join(pem(other_key=True)), 0o600, "not that of the first certificate"),
        ("".join(pem(days=-1)), 0o600, "expired on"),
    ],
)
def test_wrong_certificates_are_refused_in_one_line(text: str, mode: int, message: str) -> None:
    with pytest.raises(tls_certificate.Refused) as refused:
        tls_certificate.check(text.encode(), mode, "F")
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_the_plugin_reads_a_certificate(tmp_path: Path) -> None:
    path = tmp_path / "edge.pem"
    path.write_text("".join(pem()))
    path.chmod(0o600)
    assert run_task({"glm.fleet.tls_certificate": {"path": str(path)}}, directory=tmp_path)["expires"]
    assert "warnings" not in run_task({"glm.fleet.tls_certificate": {"path": str(path)}}, directory=tmp_path)
    path.write_text("".join(pem(days=12)))
    (warning,) = run_task({"glm.fleet.tls_certificate": {"path": str(path)}}, directory=tmp_path)["warnings"]
    assert re.search(r"edge.pem: the certificate expires on \d{4}-\d\d-\d\d, in 1[12] days: renew it", str(warning))
    missing = run_task({"glm.fleet.tls_certificate": {"path": f"{path}.absent"}}, directory=tmp_path)
    assert missing["msg"] == f"{path}.absent: No such file or directory"
