"""The controller's checks of API keys and certificates, run by a real ansible-playbook without a node."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.glm.fleet.plugins.action import tls_certificate
from ansible_collections.glm.fleet.plugins.filter import keys
from ansible_collections.glm.fleet.plugins.plugin_utils import key_file, private
from certificates import pem
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
)

# Of each there is a module too, for its documentation.

ROOT = Path(__file__).resolve().parents[2]
KEY, OTHER_KEY = "sk-glm-" + "k" * 43, "sk-glm-" + "o" * 43


def test_keys_are_read_between_comments_and_blanks() -> None:
    found = key_file.parse(f"# mine\n\n{KEY}\n  {OTHER_KEY}  # bob's\n", "F")
    assert [entry.key for entry in found] == [KEY, OTHER_KEY]
    # As a log has always called them.
    assert [entry.name for entry in found] == [hashlib.sha256(key.encode()).hexdigest()[:8] for key in (KEY, OTHER_KEY)]
    assert KEY not in repr(found)


def test_a_line_has_a_name_and_limits() -> None:
    (entry,) = key_file.parse(f"{KEY} alice requests_per_minute=60 concurrent=4 expires=2027-01-31\n", "F")
    day = datetime.datetime(2027, 1, 31, tzinfo=datetime.timezone.utc)
    public = {"name": "alice", "digest": entry.sha256[:8], "requests_per_minute": 60, "concurrent": 4}
    assert entry.public() == {**public, "expires": "2027-01-31", "expires_at": int(day.timestamp())}
    (later,) = key_file.parse(f"{KEY} expires=2027-01-31T18:00:00Z\n", "F")
    assert later.expires_at - entry.expires_at == 18 * 3600


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "F holds no key: put one a line in it, or delete it to have one made"),
        ("# nothing\n\n", "F holds no key"),
        ("short\n", "F, line 1: not an API key"),
        (f"{KEY}\n{KEY} # me\n", "F, line 2: the same key as in line 1: delete one of them"),
        (f"{KEY} a\n{OTHER_KEY} a\n", "F, line 2: the same name as in line 1: give it another one"),
        (f"alice {KEY}\n", "F, line 1: not an API key (20 to 512 of A-Z a-z 0-9 . _ ~ + / = -): write KEY [NAME]"),
        (f"{OTHER_KEY} {KEY}\n", "F, line 1: the second word is no name: write 1 to 64 of"),
        (f"{KEY} a:b\n", "F, line 1: the second word is no name"),
        (f"{KEY} {'n' * 65}\n", "F, line 1: the second word is no name"),
        (
            f"{KEY} a rpm=3\n",
            "F, line 1: a word that is no limit, or one twice: write KEY [NAME] [requests_per_minute=N]",
        ),
        (f"{KEY} a b\n", "F, line 1: a word that is no limit"),
        (f"{KEY} concurrent=1 concurrent=2\n", "F, line 1: a word that is no limit, or one twice"),
        (f"{KEY} concurrent=0\n", "F, line 1: concurrent takes a whole number from 1 on: write concurrent=60"),
        (f"{KEY} expires=31.1.2027\n", "F, line 1: expires takes a day: write expires=2027-01-31"),
        (f"# mine\n{KEY}\n{OTHER_KEY}\n{KEY}\n", "F, line 4: the same key as in line 2"),
        (f"{KEY}\u00e9\n", "F, line 1: not an API key"),
    ],
)
def test_wrong_files_are_refused_in_one_line_without_a_key(text: str, message: str) -> None:
    with pytest.raises(private.Refused) as refused:
        key_file.parse(text, "F")
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert KEY not in str(refused.value)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_a_file_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "keys"
    path.write_text(KEY)
    path.chmod(mode)
    with pytest.raises(private.Refused, match="chmod 600"):
        private.check_private(str(path))


def test_a_made_key_is_private_random_and_valid(tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        path = tmp_path / name
        private.write(str(path), f"{key_file.new_key()}\n")
        assert path.stat().st_mode & 0o777 == 0o600
        made += [entry.key for entry in key_file.parse(path.read_text(), str(path))]
    assert made[0] != made[1] and all(len(key) == 50 and key.startswith("sk-glm-") for key in made)


TEXT = f"# ours\n{KEY} alice concurrent=2\n\n{OTHER_KEY} bob # a friend\n"


def edited(action: str, name: str, text: str = TEXT, grace: float = 0, **limits: Any) -> str:
    return key_file.edit(text, "F", action, name, limits, grace=grace)


def by_name(text: str) -> dict[str, key_file.Entry]:
    return {entry.name: entry for entry in key_file.parse(text, "F")}


def test_an_added_key_is_a_line_more() -> None:
    after = edited("add", "carol", TEXT.rstrip("\n"), requests_per_minute=60, expires="2027-01-31")
    assert after.startswith(TEXT)
    assert re.fullmatch(r"sk-glm-\S{43} carol requests_per_minute=60 expires=2027-01-31\n", after.removeprefix(TEXT))


def test_a_revoked_key_is_a_line_less() -> None:
    assert edited("revoke", "alice") == f"# ours\n\n{OTHER_KEY} bob # a friend\n"
    unnamed = hashlib.sha256(KEY.encode()).hexdigest()[:8]
    assert edited("revoke", unnamed, f"{KEY}\n{OTHER_KEY}\n") == f"{OTHER_KEY}\n"


def test_a_rotated_key_keeps_its_name_and_limits() -> None:
    after = edited("rotate", "alice")
    alice = by_name(after)["alice"]
    assert (alice.concurrent, alice.line) == (2, 2) and alice.key != KEY and KEY not in after
    assert by_name(edited("rotate", "alice", concurrent=5))["alice"].concurrent == 5


def test_a_rotated_key_may_go_on_for_a_while() -> None:
    after = edited("rotate", "alice", grace=2)
    old = by_name(after)["alice-old"]
    assert (old.key, old.concurrent) == (KEY, 2)
    assert 7100 < old.expires_at - time.time() <= 7200
    # The one before ends with the next rotation, and all of a user's keys with the user.
    again = edited("rotate", "alice", after, grace=2)
    assert by_name(again)["alice-old"].key == by_name(after)["alice"].key and KEY not in again
    assert set(by_name(edited("revoke", "alice", again))) == {"bob"}
    # A key that ends sooner does not live longer by it.
    soon = edited("rotate", "carol", f"{KEY} carol expires=2026-01-01\n", grace=2)
    assert by_name(soon)["carol-old"].expires == "2026-01-01"


@pytest.mark.parametrize(
    ("action", "name", "limits", "message"),
    [
        ("add", "alice", {}, "F has a key alice: take another name, or rotate that key"),
        ("add", "", {}, "the name of a key is needed: 1 to 64 of"),
        ("add", KEY, {}, "the name of a key is needed: 1 to 64 of"),
        ("add", "carol", {"expires": "soon"}, "the new key: expires takes a day"),
        (
            "add",
            "carol",
            {"rpm": 1},
            "the new key: there is no limit rpm: take requests_per_minute, concurrent, expires",
        ),
        ("revoke", "carol", {}, "F has no key carol (it has alice, bob)"),
        ("rotate", "carol", {}, "F has no key carol (it has alice, bob)"),
    ],
)
def test_a_wrong_edit_is_refused(action: str, name: str, limits: dict[str, Any], message: str) -> None:
    with pytest.raises(private.Refused) as refused:
        edited(action, name, **limits)
    assert message in str(refused.value) and KEY not in str(refused.value)


def test_the_only_key_is_not_taken_away() -> None:
    with pytest.raises(private.Refused, match="alice is the only key of F: rotate it, or add another one first"):
        edited("revoke", "alice", f"{KEY} alice\n")


def test_limits_are_divided_among_gateways() -> None:
    text = f"{KEY} alice requests_per_minute=5 concurrent=1\n{OTHER_KEY} bob\n"
    for shares, limits in ((1, (5, 1)), (2, (3, 1)), (0, (0, 0))):
        alice, bob = keys.edge_keys(text, shares)
        assert (alice["requests_per_minute"], alice["concurrent"]) == limits
        assert (bob["requests_per_minute"], bob["concurrent"], bob["expires_at"]) == (0, 0, 0)
    assert keys.edge_keys("", 1) == []


def test_a_user_of_the_file_takes_a_key_that_works() -> None:
    assert keys.first_key(f"# x\n{KEY} old expires=2020-01-01\n{OTHER_KEY}\n") == OTHER_KEY


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
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700


def test_the_plugin_edits_and_shows_no_key(tmp_path: Path) -> None:
    path = tmp_path / "api-keys.txt"
    private.write(str(path), TEXT)
    task = {"glm.fleet.api_keys": {"path": str(path), "edit": "rotate", "name": "alice"}}
    promised = run_task(task, "--check", "--diff", directory=tmp_path)
    assert promised["changed"] and path.read_text() == TEXT
    done = run_task(task, "--diff", directory=tmp_path)
    text = path.read_text()
    assert done["changed"] and KEY not in text and path.stat().st_mode & 0o777 == 0o600
    assert [key["name"] for key in done["keys"]] == ["alice", "bob"]
    assert by_name(text)["alice"].key not in done["output"] and OTHER_KEY not in done["output"]


def encrypt(path: Path, password: Path) -> None:
    """By Ansible Vault; git gives such a file back with this mode."""
    password.write_text("secret\n")
    vault = [str(Path(sys.executable).with_name("ansible-vault")), "encrypt", "--vault-password-file", str(password)]
    subprocess.run([*vault, str(path)], check=True, capture_output=True)
    path.chmod(0o644)


def test_an_encrypted_file_is_edited_by_hand(tmp_path: Path) -> None:
    path, password = tmp_path / "api-keys.txt", tmp_path / "password"
    private.write(str(path), TEXT)
    encrypt(path, password)
    before = path.read_text()
    task = {"glm.fleet.api_keys": {"path": str(path), "edit": "revoke", "name": "alice"}}
    said = run_task(task, "--vault-password-file", str(password), directory=tmp_path)
    assert said["msg"] == (
        f"{path} is encrypted: change it by `ansible-vault edit {path}`, then apply it by playbooks/keys.yml "
        "(glm-fleet keys apply)"
    )
    assert said["failure"]["nothing_changed"] and path.read_text() == before
    read = {"glm.fleet.api_keys": {"path": str(path)}}
    found = run_task(read, "--vault-password-file", str(password), directory=tmp_path)
    assert [key["name"] for key in found["keys"]] == ["alice", "bob"]


def test_a_file_of_keys_that_all_have_expired_is_of_no_use(tmp_path: Path) -> None:
    path = tmp_path / "api-keys.txt"
    private.write(str(path), f"{KEY} alice expires=2020-01-01\n")
    assert "keys" in run_task({"glm.fleet.api_keys": {"path": str(path)}}, directory=tmp_path)
    said = run_task({"glm.fleet.api_keys": {"path": str(path), "usable": True}}, directory=tmp_path)
    assert said["msg"] == f"{path}: each key has expired: add one with glm-fleet keys add NAME"


def test_the_plugin_says_what_to_do_about_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "absent"
    result = run_task({"glm.fleet.api_keys": {"path": str(path)}}, directory=tmp_path)
    assert result["msg"] == f"{path} does not exist: site.yml makes it, or put one key a line in it"


def test_no_key_is_made_where_it_would_be_lost(tmp_path: Path) -> None:
    path = tmp_path / "api-keys.txt"
    task = {"glm.fleet.api_keys": {"path": str(path), "generate": True, "ephemeral": True}}
    for arguments in ((), ("--check",)):
        said = run_task(task, *arguments, directory=tmp_path)
        assert said["msg"] == (
            f"{path} does not exist, and a key made here would be lost with this job: give the job a file of keys by a "
            "credential (docs/awx.md)"
        )
        assert said["failure"]["nothing_changed"] and not path.exists()
    private.write(str(path), f"{KEY} alice\n")
    assert not run_task(task, directory=tmp_path)["changed"]


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


def test_an_encrypted_certificate_may_have_the_mode_that_git_gives(tmp_path: Path) -> None:
    path, password = tmp_path / "edge.pem", tmp_path / "password"
    path.write_text("".join(pem()))
    path.chmod(0o644)
    task = {"glm.fleet.tls_certificate": {"path": str(path)}}
    assert "is open to others (mode 0644)" in str(run_task(task, directory=tmp_path)["msg"])
    encrypt(path, password)
    assert run_task(task, "--vault-password-file", str(password), directory=tmp_path)["expires"]
