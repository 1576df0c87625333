"""Action plugin: follow a systemd unit from the controller, through lost connections, with its progress shown."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible_collections.glm.fleet.plugins.plugin_utils.failures import failure
from ansible_collections.glm.fleet.plugins.plugin_utils.journal import show

# Seconds that the first call stays on the node, and the longest: each stays twice as long as the one before, so that
# a short run shows its progress soon and a long one costs few calls. All end with the run.
FIRST_WAIT, LONGEST_WAIT = 5.0, 30.0
RECONNECT_PAUSE = 5.0
MODULE = "glm.fleet.systemd_job"


class ActionModule(ActionBase):  # type: ignore[misc]
    """Calls the module of this name until the unit's run has ended."""

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        args = dict(self._task.args)
        host = (task_vars or {}).get("inventory_hostname", "")
        timeout, interval = float(args.get("timeout", 3600)), float(args.get("interval", 10))
        follow: dict[str, Any] = {"token": f"{self._task._uuid}-{time.time_ns()}", "wait": FIRST_WAIT, "started": False}
        begin = time.monotonic()
        shown, shown_at = "", begin - interval
        changed, status = False, ""
        while True:
            answer, lost = self._call({**args, "follow": follow}, task_vars, host)
            elapsed = round(time.monotonic() - begin, 1)
            if answer is None or "phase" not in answer:  # unreachable, or the arguments are wrong
                return {**result, **lost, **(answer or {}), "changed": changed, "elapsed": elapsed}
            changed = changed or bool(answer["changed"])
            status = answer["status_text"] or status
            line = f"{host} · {args['name']} · {status}"
            if status and changed and line != shown and time.monotonic() - shown_at >= interval:
                show(host, f"{args['name']} · {status}")
                shown, shown_at = line, time.monotonic()
            result.update(changed=changed, elapsed=elapsed, status_text=status, inactive_s=answer.get("inactive_s"))
            if answer["phase"] == "done":
                return {**result, "result": answer.get("result", {})}
            if answer["phase"] == "failed":
                found = failure("unit_failed", answer["message"], host=host, unit=args["name"])
                return {**result, "failed": True, "msg": answer["message"], "failure": found}
            if elapsed >= timeout:
                return {
                    **result,
                    "failed": True,
                    "msg": (
                        f"{args['name']} is still at it after {elapsed:.0f} s"
                        f"{f' ({status})' if status else ''}; it was left running: journalctl -u {args['name']}"
                    ),
                }
            follow.update(
                started=answer["phase"] != "lost",
                wait=min(2 * follow["wait"], LONGEST_WAIT, max(0.0, timeout - elapsed)),
                run_id=answer["run_id"],
                boot=answer["boot"],
            )
            if answer["phase"] == "lost":  # the node went through a restart, and the run with it
                show(host, f"{args['name']} · the node was restarted: starting again")
                follow.update(token=f"{follow['token']}+", run_id="", boot="")

    def _call(
        self, args: dict[str, Any], task_vars: dict[str, Any] | None, host: str
    ) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """One call of the module, tried until the node can be reached again."""
        patience = float(args.get("reconnect_timeout", 600))
        lost_at: float | None = None
        while True:
            try:
                return self._execute_module(module_name=MODULE, module_args=args, task_vars=task_vars), {}
            except AnsibleConnectionFailure as problem:
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at >= patience:
                    return None, {
                        "unreachable": True,
                        "msg": (
                            f"{args['name']}: no connection to the node for {patience:.0f} s, "
                            "the unit goes on without it; "
                            f"run the play again to follow it ({str(problem.message).strip()})"
                        ),
                    }
                show(host, f"{args['name']} · connection lost, reconnecting (the unit goes on)")
                with contextlib.suppress(Exception):
                    self._connection.reset()
                time.sleep(RECONNECT_PAUSE)
