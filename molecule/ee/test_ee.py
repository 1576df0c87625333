"""site.yml in the execution environment, from checkouts that begin with nothing: the same end, and no new key."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from awx import IMAGE, Demo, Job, NewJob, checkout
from testbed import Play, Run, docker

TOKEN = "hf_" + "t" * 34
KEYS_MAP = "/etc/glm/gateway/keys.map"


def ask(key: str) -> int:
    request = urllib.request.Request("http://198.18.64.10:8000/v1/models", headers={"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as refused:
        return refused.code


def with_credentials(job: Job, demo: Demo, number: int) -> Job:
    job.credential("glm-fleet API keys", api_keys=f"{demo.key} alice")
    job.credential("glm-fleet Hugging Face token", token=TOKEN)
    # The demo's hub has no TLS.
    job.variables |= {"awx_job_id": number, "glm_hf_token_over_http": True}
    return job


def changed_nothing(run: Run) -> None:
    assert run.code == 0, run.output[-3000:] + run.errors
    assert "1 of 1 node ok" in run.output and "PLAY RECAP" in run.output
    assert run.recap("ok") > 0 and run.recap("changed") == run.recap("failed") == run.recap("unreachable") == 0


@pytest.fixture(scope="module")
def served(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the node holds of keys after a first job; the job's checkout and credentials are gone."""
    scratch = tmp_path_factory.mktemp("first")
    job = Job(checkout(scratch / "checkout"), scratch / "private", IMAGE, demo.agent)
    job.credential("glm-fleet host keys", known_hosts=demo.known_hosts)
    run = with_credentials(job, demo, 1).run("site.yml", seconds=1800)
    assert run.code == 0, run.output[-5000:] + run.errors
    assert "1 of 1 node ok" in run.output and run.recap("changed") > 0 and run.recap("failed") == 0
    assert demo.key not in run.output + run.errors and TOKEN not in run.output + run.errors
    assert not (job.project / "inventory/demo/keys").exists()
    return demo.node.run(f"cat {KEYS_MAP}")


def test_a_first_job_makes_an_endpoint_of_a_bare_node(served: str, demo: Demo) -> None:
    assert "alice" in served and demo.key not in served
    assert ask(demo.key) == 200 and ask("sk-glm-" + "x" * 36) == 401
    assert demo.node.run("cat /etc/glm/hf-token; stat -c %a /etc/glm/hf-token").split() == [TOKEN, "600"]


def test_a_second_job_from_a_fresh_checkout_changes_nothing(served: str, demo: Demo, job: NewJob) -> None:
    second = with_credentials(job(), demo, 2)
    changed_nothing(second.run("site.yml"))
    assert demo.node.run(f"cat {KEYS_MAP}") == served and ask(demo.key) == 200
    assert not (second.project / "inventory/demo/keys").exists()


def test_the_collection_within_it_serves_a_project_that_has_an_inventory_alone(
    served: str, demo: Demo, job: NewJob
) -> None:
    """Its keys lie in the repository, encrypted by Ansible Vault, with the mode that git gives."""
    own = job("inventory/demo")
    keys = own.project / "inventory/demo/api-keys.vault"
    (own.private / "vault").mkdir()
    password = own.file("vault/password", "a password\n")  # ansible-navigator mounts its folder by itself
    vault = [str(Path(sys.executable).with_name("ansible-vault")), "encrypt", "--vault-password-file", str(password)]
    subprocess.run([*vault, "--output", str(keys)], input=f"{demo.key} alice\n", text=True, check=True)
    keys.chmod(0o644)
    own.credential("glm-fleet Hugging Face token", token=TOKEN)
    own.variables |= {"awx_job_id": 3, "glm_hf_token_over_http": True}
    own.variables["glm_api_keys_file"] = "{{ inventory_dir }}/api-keys.vault"
    run = own.run("glm.fleet.site", "--vault-password-file", str(password))
    changed_nothing(run)
    assert demo.key not in run.output + run.errors
    assert demo.node.run(f"cat {KEYS_MAP}") == served
    assert stat.S_IMODE(keys.stat().st_mode) == 0o644 and keys.read_text().startswith("$ANSIBLE_VAULT")


def test_ansible_playbook_finds_the_same_end(served: str, demo: Demo, job: NewJob, tmp_path: Path) -> None:
    own = with_credentials(job(), demo, 4)
    os.environ["SSH_AUTH_SOCK"] = demo.agent
    try:
        play = Play(tmp_path, own.project / "inventory/demo")
        changed_nothing(play(seconds=600, **own.variables))
    finally:
        del os.environ["SSH_AUTH_SOCK"]
    assert demo.node.run(f"cat {KEYS_MAP}") == served


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (5, "{file} does not exist, and a key made here would be lost with this job: give the job a file of keys by a "
            "credential (docs/awx.md)"),
        (0, "Nothing was changed: API keys are already on demo-1, and {file} is not there: put the file there that "
            "they came from, or set glm_new_api_keys: true, after which each client needs a new key"),
    ],
    ids=["in AWX", "in ansible-navigator"],
)  # fmt: skip
def test_a_job_without_keys_makes_none(served: str, demo: Demo, job: NewJob, number: int, line: str) -> None:
    own = job()
    own.variables |= {"awx_job_id": number} if number else {}
    run = own.run("site.yml")
    file = own.project / "inventory/demo/keys/api-keys.txt"
    assert run.code != 0 and run.recap("changed") == 0
    assert run.messages == [line.format(file=file)]
    assert not file.exists() and demo.node.run(f"cat {KEYS_MAP}") == served and ask(demo.key) == 200


def test_a_node_with_another_host_key_is_not_talked_to(served: str, demo: Demo, job: NewJob, tmp_path: Path) -> None:
    """ansible-runner would have it otherwise: ANSIBLE_HOST_KEY_CHECKING=False."""
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(other)], check=True)
    own = with_credentials(job(known_hosts=f"198.18.64.10 {other.with_suffix('.pub').read_text()}"), demo, 6)
    run = own.run("site.yml")
    assert run.code != 0 and run.recap("unreachable") == 1 and run.recap("changed") == 0
    assert "Host key verification failed" in run.output, run.output[-3000:]


def test_an_image_without_the_collection_is_refused_in_one_line(job: NewJob) -> None:
    bare = f"{IMAGE}-without-collection"
    lines = f"FROM {IMAGE}\nUSER root\nRUN rm -r /usr/share/ansible/collections\nUSER 1000\n"
    docker("build", "--quiet", "--tag", bare, "-", stdin=lines)
    try:
        run = job("inventory/demo", image=bare).run("glm.fleet.site")
    finally:
        docker("image", "rm", bare)
    assert run.code != 0 and run.output == ""
    # The second line is ansible-navigator's own, of any failure.
    assert run.errors.splitlines() == [
        "[ERROR]: the playbook: glm.fleet.site could not be found",
        "Please review the log for errors.",
    ]
