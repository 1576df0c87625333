"""Secrets: canary values in every place that takes one, then looked for in everything that a run leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CANARY, GATEWAYS, INVENTORY, NODES, Case
from testbed import ROOT

TOKEN = "hf_CanaryTokenThatMustNotLeak0123456789"  # of the hub
ENVIRONMENT = "canary-environment-that-must-not-leak"
EXTRA = "canary-engine-environment-that-must-not-leak"


def holders(case: Case, host: str, secret: str) -> list[str]:
    """Files of a host that hold it, and that another user than root can read."""
    places = "/etc /opt /var/lib/glm /var/log /run /tmp /root /home /usr/local"
    found = (
        case.node(host)
        .run(f"grep -rlsF --exclude-dir=models --exclude-dir=cgroup -- '{secret}' {places} || true")
        .split()
    )
    readable = "runuser -u nobody -- cat {path} >/dev/null 2>&1 && echo yes || true"
    return [path for path in found if case.node(host).run(readable.format(path=path)).strip()]


@pytest.mark.vital
@pytest.mark.fault("a canary in the token, the keys, the environment and a setting")
def test_no_secret_is_left_behind(case: Case, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    token.chmod(0o600)
    secrets = {"token": TOKEN, "environment": ENVIRONMENT, "setting": EXTRA, "key": case.fleet.key()}
    runs = tmp_path / "runs"
    command = [
        sys.executable, "-m", "glm_fleet", "up", "-i", str(INVENTORY), "--runs", str(runs),
        "-e", f"glm_hf_token_file={token}", "-e", '{"glm_rollout_waves": [1, 1], "glm_hf_token_over_http": true}',
        "-e", f'{{"faults_engine_env": {{"MY_SECRET": "{EXTRA}"}}}}',
    ]  # fmt: skip
    seen: list[str] = []
    environment = {**os.environ, "AWS_SECRET_ACCESS_KEY": ENVIRONMENT}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        while run.poll() is None:
            for host in NODES:
                seen.append(case.node(host).run("ps -eo args"))
            seen.append(subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout)
            try:
                run.wait(timeout=2)
            except subprocess.TimeoutExpired:
                continue
        assert run.stdout
        output = run.stdout.read()
    assert run.returncode == 0, output[-3000:]
    own = f"{run.pid} "
    for name, secret in secrets.items():
        # The command of whoever typed the setting is theirs.
        lines = [
            line for text in seen for line in text.splitlines() if secret in line and not line.strip().startswith(own)
        ]
        assert not lines, f"{name}: in the arguments of {lines[0]}"
        assert secret not in output, f"{name}: in the output"
        for directory in (runs, ROOT / "results"):
            left = [path for path in directory.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
            assert not left, f"{name}: in {left}"
        for host in (*NODES, *GATEWAYS):
            assert holders(case, host, secret) == [], f"{name}: on {host}"
            journal = case.node(host).run(f"journalctl --no-pager | grep -cF -- '{secret}' || true")
            assert journal.strip() == "0", f"{name}: in the journal of {host}"
        if name != "setting":  # the engine's environment is for its container
            assert secret not in case.node(CANARY).run("docker inspect $(docker ps -aq)"), f"{name}: in docker inspect"
    labels = case.node(CANARY).run(
        "docker inspect --format '{{json .Config.Labels}} {{json .Config.Cmd}} {{json .Args}}' $(docker ps -aq)"
    )
    assert EXTRA not in labels
    assert {oct(path.stat().st_mode & 0o777) for path in runs.iterdir()} == {"0o700"}
    assert not list(runs.glob("*/private")), "the private directory was left"
    case.what = (
        "found nowhere but in root's own 0600 files: arguments, output, journals, docker inspect, artifacts, files"
    )
    back = case.play(seconds=400)
    assert back.code == 0, back.messages
