"""The commands of glm-fleet."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from glm_fleet import inventory as inventories
from glm_fleet import journal, tables
from glm_fleet.errors import FULL, Exit, UsageProblem, one_line
from glm_fleet.inventory import Inventory
from glm_fleet.playbook import ROOT, Order, Outcome, Playbook, approve
from glm_fleet.tables import Shown
from glm_fleet.view import Screen, State, View, view

EPILOG = """\b
Exit codes:
  0    all ok
  2    usage: the command, the inventory, a file of this machine
  10   a node failed; it was rolled back where it could be, and the rollout halted
  11   a node could not be reached
  12   refused before anything was changed
  13   another rollout holds the lock
  130  ended by Ctrl-C, or without a yes to --pause
"""


class Group(click.Group):
    """Says what is wrong in one line, whichever command it was in."""

    def main(self, *args: Any, **more: Any) -> Any:
        try:
            return super().main(*args, **{**more, "standalone_mode": False})
        except click.exceptions.Exit as end:
            sys.exit(end.exit_code)
        except (click.Abort, KeyboardInterrupt):
            sys.exit(Exit.INTERRUPTED)
        except click.exceptions.NoArgsIsHelpError as problem:
            click.echo(problem.format_message(), err=True)
            sys.exit(Exit.USAGE)
        except click.ClickException as problem:
            where = problem.ctx.command_path if isinstance(problem, click.UsageError) and problem.ctx else "glm-fleet"
            fail(f"{one_line(problem.format_message())} Try: {where} --help", Exit.USAGE)
        except UsageProblem as problem:
            fail(str(problem), Exit.USAGE)
        except OSError as problem:
            if problem.errno not in FULL:
                raise
            fail(f"{problem.filename or 'a file of this machine'}: {problem.strerror}: free some", Exit.USAGE)


def fail(line: str, code: Exit) -> None:
    print(f"glm-fleet: {line}", file=sys.stderr)
    sys.exit(code)


@click.group(cls=Group, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Puts GLM-5.2 on HGX B200 nodes, and keeps it there.

    Each command runs a playbook of this project, and shows it as it goes; what it does can also be done with
    ansible-playbook alone.
    """


def nodes_completion(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """The nodes of the inventory, for the shell."""
    try:
        found = read_inventory(Path(ctx.params.get("inventory") or "inventory/lambda"))
    except Exception:  # a completion never fails
        return []
    return [node for node in found.nodes if node.startswith(incomplete)]


def runs_completion(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """The runs of the inventory, for the shell."""
    try:
        runs = runs_of(read_inventory(Path(ctx.params.get("inventory") or "inventory/lambda")), ctx.params.get("runs"))
    except Exception:  # a completion never fails
        return []
    return [run.name for run in journal.known(runs) if run.name.startswith(incomplete)]


def common(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command."""
    options = [
        click.option(
            "-i", "--inventory", type=click.Path(path_type=Path), default=Path("inventory/lambda"), show_default=True,
            is_eager=True, help="The inventory: a directory, or a file in it.",
        ),
        click.option(
            "--vault-password-file", type=click.Path(exists=True, path_type=Path), help="For an encrypted inventory."
        ),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and nothing else."),
        click.option(
            "--runs", type=click.Path(path_type=Path), help="Where the journals go.  [default: results/INVENTORY/runs]"
        ),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def running(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a command that runs a playbook over nodes."""
    options = [
        click.option("-e", "--extra-vars", multiple=True, metavar="NAME=VALUE|@FILE", help="A setting for this run."),
        click.option("--env", "keep", multiple=True, metavar="NAME", help="Let Ansible see this environment variable."),
    ]
    for option in reversed(options):
        function = option(function)
    return common(function)


NODES = click.argument("nodes", nargs=-1, shell_complete=nodes_completion)
CHECK = click.option("--check", is_flag=True, help="Change nothing: show what would be changed.")
WAVES = click.option("--waves", metavar="LIST", help='Nodes of each wave, such as "1,10%,25%".')
BREAK_LOCK = click.option("--break-lock", is_flag=True, help="Take over the lock of another rollout.")


@main.command(
    epilog="\b\nExamples:\n  glm-fleet up -i inventory/lambda\n  glm-fleet up -i inventory/lambda node-1 --check"
)
@NODES
@CHECK
@BREAK_LOCK
@running
def up(nodes: tuple[str, ...], check: bool, break_lock: bool, **common: Any) -> None:
    """Take bare nodes, or those that serve, to a verified endpoint (site.yml)."""
    settings = chosen(glm_rollout_break_lock=break_lock or None)
    play("up", "site.yml", nodes, settings, waves=True, check=check, **common)


@main.command(
    epilog='\b\nExamples:\n  glm-fleet rollout -i inventory/lambda --waves "1,25%" --soak 300\n'
    "  glm-fleet rollout -i inventory/lambda --pause -e glm_image=vllm/vllm-openai@sha256:..."
)
@NODES
@CHECK
@WAVES
@click.option("--soak", type=click.IntRange(min=0), metavar="SECONDS", help="How long each node is watched afterwards.")
@click.option("--pause", is_flag=True, help="Ask whether to go on after the first wave.")
@click.option("--max-failures", type=click.IntRange(min=0), metavar="N", help="Failed nodes that do not halt it.")
@BREAK_LOCK
@running
def rollout(
    nodes: tuple[str, ...],
    *,
    check: bool,
    waves: str | None,
    soak: int | None,
    pause: bool,
    max_failures: int | None,
    break_lock: bool,
    **common: Any,
) -> None:
    """Take the fleet to another release, wave by wave (site.yml)."""
    settings = chosen(
        glm_rollout_waves=wave_list(waves),
        glm_rollout_soak=soak,
        glm_rollout_pause=pause or None,
        glm_rollout_max_failures=max_failures,
        glm_rollout_break_lock=break_lock or None,
    )
    play("rollout", "site.yml", nodes, settings, waves=True, check=check, **common)


def chosen(**options: Any) -> dict[str, Any]:
    """Those that the user has given: the others are the inventory's."""
    return {name: value for name, value in options.items() if value is not None}


def wave_list(text: str | None) -> list[int | str] | None:
    """From 1,10%,25% to what glm_rollout_waves takes, which judges the shares."""
    waves: list[int | str] = []
    for part in text.split(",") if text is not None else []:
        try:
            waves.append(part.strip() if "%" in part else int(part))
        except ValueError:
            raise UsageProblem(f"--waves: {part.strip()!r} is neither a count nor a share such as 25%") from None
    return waves or None


@main.command(epilog="\b\nExample:\n  glm-fleet plan -i inventory/lambda")
@NODES
@running
def plan(nodes: tuple[str, ...], **common: Any) -> None:
    """Print what would be started on each node; none is contacted (playbooks/plan.yml)."""
    # It shows the engine's environment, which may hold a secret.
    play("plan", "playbooks/plan.yml", nodes, after=tables.commands, kept=False, **common)


@main.command(epilog="\b\nExample:\n  glm-fleet status -i inventory/lambda --json")
@running
def status(**common: Any) -> None:
    """Show what each node serves and how it does (playbooks/status.yml)."""
    play("status", "playbooks/status.yml", (), after=tables.status, **common)


@main.command(epilog="\b\nExample:\n  glm-fleet verify -i inventory/lambda node-1")
@NODES
@running
def verify(nodes: tuple[str, ...], **common: Any) -> None:
    """Ask each node whether it serves what its release says (playbooks/verify.yml)."""
    play("verify", "playbooks/verify.yml", nodes, after=tables.checks, **common)


@main.command(epilog="\b\nExample:\n  glm-fleet bench -i inventory/lambda node-1 -e glm_benchmark=full")
@NODES
@running
def bench(nodes: tuple[str, ...], **common: Any) -> None:
    """Measure the engine of each node (playbooks/benchmark.yml)."""
    play("bench", "playbooks/benchmark.yml", nodes, after=tables.benchmarks, **common)


@main.command(epilog="\b\nExample:\n  glm-fleet accept -i inventory/lambda node-9")
@NODES
@running
def accept(nodes: tuple[str, ...], **common: Any) -> None:
    """Measure nodes that do not serve, and compare them with the fleet (playbooks/accept.yml)."""
    play("accept", "playbooks/accept.yml", nodes, **common)


@main.command(
    epilog="\b\nExamples:\n  glm-fleet rollback -i inventory/lambda\n  glm-fleet rollback node-1 --release 0123456789ab"
)
@NODES
@click.option("--release", metavar="ID", help="The release to go to.  [default: the one before]")
@WAVES
@BREAK_LOCK
@running
def rollback(nodes: tuple[str, ...], release: str | None, waves: str | None, break_lock: bool, **common: Any) -> None:
    """Take nodes back to the release before (playbooks/rollback.yml)."""
    settings = chosen(
        glm_release=release, glm_rollout_waves=wave_list(waves), glm_rollout_break_lock=break_lock or None
    )
    play("rollback", "playbooks/rollback.yml", nodes, settings, waves=True, **common)


@main.command(epilog="\b\nExample:\n  glm-fleet drain -i inventory/lambda node-1")
@click.argument("nodes", nargs=-1, required=True, shell_complete=nodes_completion)
@running
def drain(nodes: tuple[str, ...], **common: Any) -> None:
    """Take nodes out of rotation once their requests have ended (playbooks/drain.yml)."""
    play("drain", "playbooks/drain.yml", nodes, **common)


@main.command(epilog="\b\nExample:\n  glm-fleet undrain -i inventory/lambda node-1")
@click.argument("nodes", nargs=-1, required=True, shell_complete=nodes_completion)
@running
def undrain(nodes: tuple[str, ...], **common: Any) -> None:
    """Verify nodes, and put them back into rotation (playbooks/undrain.yml)."""
    play("undrain", "playbooks/undrain.yml", nodes, **common)


@main.command(
    epilog="\b\nExamples:\n  glm-fleet launch -i inventory/lambda-cloud --count 2 --region us-east-1 --check\n"
    "  glm-fleet launch -i inventory/lambda-cloud --count 2 --region us-east-1 --accept-cost 107.04"
)
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="Nodes that are to be there.  [default: 1]")
@click.option("--region", metavar="NAME", help="Lambda's region to launch in.")
@click.option("--type", "kind", metavar="NAME", help="Lambda's type of instance.  [default: 8x B200]")
@click.option("--accept-cost", type=click.FloatRange(min=0), metavar="USD", help="Do not ask, up to this an hour.")
@CHECK
@running
def launch(
    *, count: int | None, region: str | None, kind: str | None, accept_cost: float | None, check: bool, **common: Any
) -> None:
    """Launch nodes at Lambda Cloud that are not there (playbooks/launch.yml).

    What they cost is said before, and asked for where --accept-cost does not say it.
    """
    settings = chosen(glm_launch_count=count, glm_launch_region=region, glm_launch_type=kind)
    if accept_cost is None and not check:
        accept_cost = ask_cost(settings, common)
    settings["glm_launch_accept_cost"] = f"{accept_cost or 0:.2f}"
    play("launch", "playbooks/launch.yml", (), settings, check=check, empty=True, after=tables.launched, **common)


def ask_cost(settings: dict[str, Any], common: dict[str, Any]) -> float:
    """Dollars an hour that the user says yes to, by a run that only looks. 0 where nothing is to be launched."""
    read = read_inventory(common["inventory"], common["vault_password_file"], empty=True)
    arguments = [*vault_arguments(common["vault_password_file"]), "--check"]
    extra = [*extra_settings(common["extra_vars"]), settings]
    order = Order("launch", "playbooks/launch.yml", read.path, "", extra, arguments, common["keep"], check=True)
    state = State(f"glm-fleet launch · {read.name}", ())
    with tempfile.TemporaryDirectory(prefix="glm-fleet.") as scratch:
        outcome = execute(order, journal.create(Path(scratch), "launch"), state, silent=True)
    if outcome.code is not Exit.OK:
        fail("; ".join(outcome.messages), outcome.code)
    plan = state.facts.get("localhost", {}).get("launch", {})
    if not plan.get("launch"):
        return 0
    line = f"{', '.join(plan['launch'])} ({plan['type']}, {' or '.join(plan['regions'])}) cost {plan['cost']} an hour"
    dollars = plan["cents_per_hour"] / 100
    if not sys.stdin.isatty():
        fail(f"{line}, which nobody has accepted: --accept-cost {dollars:.2f}", Exit.REFUSED)
    if not click.confirm(f"{line}, until they are given back. Launch?", err=True):
        sys.exit(Exit.INTERRUPTED)
    return float(dollars)


@main.command(epilog="\b\nExample:\n  glm-fleet drain node-1 && glm-fleet release -i inventory/lambda-cloud node-1")
@click.argument("nodes", nargs=-1, required=True, shell_complete=nodes_completion)
@click.option("--serving", is_flag=True, help="Also nodes that serve, or that are not reached.")
@CHECK
@running
def release(nodes: tuple[str, ...], serving: bool, check: bool, **common: Any) -> None:
    """Give nodes back to Lambda Cloud that serve nothing; their disks are lost (playbooks/release.yml)."""
    settings = chosen(glm_give_back=list(nodes), glm_give_back_serving=serving or None)
    play("release", "playbooks/release.yml", (), settings, check=check, empty=True, **common)


@main.group(
    epilog="\b\nExamples:\n  glm-fleet keys list -i inventory/lambda\n  glm-fleet keys revoke -i inventory/lambda alice"
)
def keys() -> None:
    """Change the API keys on all edges at once, and nothing else (playbooks/keys.yml).

    The file on this machine is edited first. It works beside a rollout; no request in work is cut.
    """


def limits(function: Callable[..., Any]) -> Callable[..., Any]:
    """The limits of a new key."""
    options = [
        click.option("--requests-per-minute", type=click.IntRange(min=1), metavar="N", help="Requests in a minute."),
        click.option("--concurrent", type=click.IntRange(min=1), metavar="N", help="Requests in work at once."),
        click.option("--expires", metavar="YYYY-MM-DD", help="The day from whose 00:00 UTC on the key is refused."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


KEY = click.argument("name")


def play_keys(action: str, name: str = "", settings: dict[str, Any] | None = None, **common: Any) -> None:
    wanted = {"glm_key_action": action, "glm_key_name": name, **(settings or {})}
    after = {"list": tables.keys, "add": tables.new_key, "rotate": tables.new_key}.get(action, tables.other_edges)
    play("keys", "playbooks/keys.yml", (), wanted, after=after, **common)


@keys.command("list", epilog="\b\nExample:\n  glm-fleet keys list -i inventory/lambda --json")
@running
def list_keys(**common: Any) -> None:
    """Show the names and limits of the keys, and the edges that have other ones; never a key."""
    play_keys("list", **common)


@keys.command("apply", epilog="\b\nExample:\n  glm-fleet keys apply -i inventory/lambda")
@running
def apply_keys(**common: Any) -> None:
    """Bring all edges to the file as it is: after an edit, or once an edge can be reached again."""
    play_keys("apply", **common)


@keys.command("add", epilog="\b\nExample:\n  glm-fleet keys add -i inventory/lambda alice --requests-per-minute 60")
@KEY
@limits
@running
def add_key(
    name: str, requests_per_minute: int | None, concurrent: int | None, expires: str | None, **common: Any
) -> None:
    """Make a key, and print it."""
    wanted = chosen(requests_per_minute=requests_per_minute, concurrent=concurrent, expires=expires)
    play_keys("add", name, {"glm_key_limits": wanted}, **common)


@keys.command("revoke", epilog="\b\nExample:\n  glm-fleet keys revoke -i inventory/lambda alice")
@KEY
@running
def revoke_key(name: str, **common: Any) -> None:
    """Take a key away. Its requests in work go on, further ones are refused."""
    play_keys("revoke", name, **common)


@keys.command("rotate", epilog="\b\nExample:\n  glm-fleet keys rotate -i inventory/lambda alice --grace 24")
@KEY
@click.option("--grace", type=click.FloatRange(min=0), default=0, metavar="HOURS", help="The old key goes on so long.")
@limits
@running
def rotate_key(
    name: str,
    *,
    grace: float,
    requests_per_minute: int | None,
    concurrent: int | None,
    expires: str | None,
    **common: Any,
) -> None:
    """Put another key in the place of one, and print it. Limits stay, but for those that are given."""
    wanted = chosen(requests_per_minute=requests_per_minute, concurrent=concurrent, expires=expires)
    play_keys("rotate", name, {"glm_key_limits": wanted, "glm_key_grace_hours": grace}, **common)


@main.command(
    epilog="\b\nExamples:\n  glm-fleet usage -i inventory/lambda\n  glm-fleet usage -i inventory/lambda --days 7 --json"
)
@click.argument("nodes", nargs=-1, shell_complete=nodes_completion)
@click.option("--days", type=click.IntRange(1, 400), default=1, metavar="N", help="Days, today among them, by UTC.")
@click.option(
    "--by", type=click.Choice(["key", "node", "day"]), multiple=True, help="One row for each.  [default: key]"
)
@running
def usage(nodes: tuple[str, ...], days: int, by: tuple[str, ...], **common: Any) -> None:
    """Show what each API key has used: requests, and tokens of prompts and answers (playbooks/usage.yml)."""
    after = partial(tables.usage, by=by or ("key",))
    play("usage", "playbooks/usage.yml", nodes, {"glm_usage_days": days}, after=after, **common)


@main.command(epilog="\b\nExample:\n  glm-fleet bundle -i inventory/site --to /media/disk/bundle")
@click.option(
    "--to",
    "directory",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Where the bundle is to be; one that is there is brought to the release.",
)
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    metavar="MANIFEST",
    help="Of a bundle that the site has already: what it names is left out.",
)
@CHECK
@running
def bundle(*, directory: Path, base: Path | None, check: bool, **common: Any) -> None:
    """Make one directory of all that nodes without a way out need (playbooks/bundle.yml).

    No node is contacted. It is made on this machine, a Debian or Ubuntu.
    """
    settings = chosen(glm_bundle_dir=str(directory.resolve()), glm_bundle_base=base and str(base.resolve()))
    play("bundle", "playbooks/bundle.yml", (), settings, check=check, **common)


@main.command(epilog="\b\nExample:\n  glm-fleet mirror -i inventory/site --from /media/disk/bundle")
@click.option(
    "--from", "directory", required=True, metavar="DIR", help="The bundle's directory on the host of the group mirror."
)
@running
def mirror(*, directory: str, **common: Any) -> None:
    """Serve a bundle to the nodes of a site (playbooks/mirror.yml)."""
    play("mirror", "playbooks/mirror.yml", (), {"glm_bundle_dir": directory}, empty=True, **common)


@main.command(epilog="\b\nExamples:\n  glm-fleet report -i inventory/lambda\n  glm-fleet report --list")
@click.argument("run", required=False, default="", shell_complete=runs_completion)
@click.option("--list", "listed", is_flag=True, help="List the runs.")
@common
def report(
    run: str, *, listed: bool, inventory: Path, vault_password_file: Path | None, as_json: bool, runs: Path | None
) -> None:
    """Write a report from a journal: RUN's beside it, else again that of the last deployment."""
    read = read_inventory(inventory, vault_password_file)
    directory = runs_of(read, runs)
    if listed:
        tables.runs(journal.known(directory), as_json)
        return
    found = journal.find(directory, run)
    entries = found.entries()
    if not entries:
        raise UsageProblem(f"{run}: this run has deployed nothing, so it has no report: glm-fleet report --list")
    target = found.directory if run else results_of(read)
    later = str(tables.read_json(target / "report.json").get("started", ""))
    if later > entries["finished"]:
        raise UsageProblem(
            f"{target}/report.json is of a run of {later}, after that of the last journal: to have a report of that "
            f"one beside its journal: glm-fleet report {found.name}"
        )
    with tempfile.TemporaryDirectory(prefix="glm-fleet.") as scratch:
        file = Path(scratch) / "run.json"
        file.write_text(json.dumps(entries), encoding="utf-8")
        settings = {"report_run_file": str(file), "report_fail": False, "report_run_directory": str(target)}
        arguments = vault_arguments(vault_password_file)
        order = Order("report", "playbooks/report.yml", read.path, extra=[settings], arguments=arguments)
        outcome = execute(order, journal.create(Path(scratch), "report"), State("report", ()), silent=True)
    if outcome.code is not Exit.OK:
        fail("; ".join(outcome.messages), outcome.code)
    tables.report(target / "report.json", as_json)


def read_inventory(path: Path, vault_password_file: Path | None = None, *, empty: bool = False) -> Inventory:
    # Of this project, wherever the command is called.
    os.environ.setdefault("ANSIBLE_CONFIG", str(ROOT / "ansible.cfg"))
    return inventories.read(path, vault_password_file, empty=empty)


def vault_arguments(vault_password_file: Path | None) -> list[str]:
    return ["--vault-password-file", str(vault_password_file.resolve())] if vault_password_file else []


def results_of(inventory: Inventory) -> Path:
    return inventory.results


def runs_of(inventory: Inventory, runs: Path | None) -> Path:
    return (runs or results_of(inventory) / "runs").resolve()


def extra_settings(texts: tuple[str, ...]) -> list[dict[str, Any] | Path]:
    """Each -e as settings by value, or a file of them; as with ansible-playbook the later one wins."""
    from ansible.errors import AnsibleError
    from ansible.parsing.dataloader import DataLoader
    from ansible.parsing.splitter import parse_kv

    parts: list[dict[str, Any] | Path] = []
    for text in texts:
        if text.startswith("@"):
            path = Path(text[1:]).resolve()
            if not path.is_file():
                raise UsageProblem(f"-e {text}: there is no such file")
            try:
                content = path.read_text(encoding="utf-8")
                found = {} if content.startswith("$ANSIBLE_VAULT") else DataLoader().load(content, str(path))
            except (OSError, ValueError, AnsibleError) as problem:
                raise UsageProblem(f"-e {text}: {one_line(problem)}") from problem
            if not isinstance(found, dict):
                raise UsageProblem(f"-e {text}: the file holds no settings: write NAME: VALUE, one a line")
            parts.append(path)
            continue
        try:
            pairs = json.loads(text) if text.startswith("{") else parse_kv(text)
        except (ValueError, AnsibleError) as problem:
            raise UsageProblem(f"-e: {problem}") from problem
        if not pairs or "_raw_params" in pairs:
            raise UsageProblem("-e: write NAME=VALUE, a JSON object, or @FILE")
        parts.append(dict(pairs))
    return parts


def play(
    command: str,
    playbook: str,
    nodes: tuple[str, ...] = (),
    settings: dict[str, Any] | None = None,
    *,
    inventory: Path,
    as_json: bool,
    runs: Path | None,
    extra_vars: tuple[str, ...],
    vault_password_file: Path | None,
    keep: tuple[str, ...],
    waves: bool = False,
    check: bool = False,
    after: Callable[[Shown, Screen], None] | None = None,
    kept: bool = True,
    empty: bool = False,
) -> None:
    """Runs a playbook and ends with its exit code; with `kept` its journal stays, with `empty` no node is needed."""
    read = read_inventory(inventory, vault_password_file, empty=empty)
    limit = read.limit(nodes)
    extra = [*extra_settings(extra_vars), settings or {}]
    arguments = vault_arguments(vault_password_file)
    if check:
        arguments += ["--check", "--diff"]
    scratch = None if kept else tempfile.TemporaryDirectory(prefix="glm-fleet.")
    run = journal.create(Path(scratch.name) if scratch else runs_of(read, runs), command)
    order = Order(command, playbook, read.path, limit, extra, arguments, keep)
    order.waves, order.changes, order.check = waves and not check, waves or command == "drain", check
    state = State(f"glm-fleet {command} · {read.name}", nodes or read.nodes)
    outcome = execute(order, run, state, silent=as_json, transient=after is not None)
    shown = Shown(state, run if kept else None)
    if as_json:
        print(json.dumps(tables.summary(command, outcome, shown), indent=2, ensure_ascii=False))
    else:
        console = Screen()
        if after:
            after(shown, console)
        tables.epilogue(console, resumed(), outcome, shown, deploys=playbook == "site.yml" and not check)
    if scratch:
        scratch.cleanup()
    sys.exit(outcome.code)


def resumed() -> str:
    """The command as it was called, for who wants to run it again."""
    return shlex.join(["glm-fleet", *sys.argv[1:]])


def execute(order: Order, run: journal.Run, state: State, silent: bool, transient: bool = False) -> Outcome:
    """Runs it in a view that fits the terminal; stdout is for the result."""
    console = Screen(stderr=True)
    with view(state, console, silent, transient) as shown:

        def listen(line: journal.Line) -> None:
            shown.line(line)
            if line["what"] == "approval":
                ask(playbook, shown, console)

        try:
            playbook = Playbook(order, run, listen)
        except OSError as problem:
            run.remove_private()
            shutil.rmtree(run.directory, ignore_errors=True)
            raise journal.unwritable(run.directory.parent, problem) from problem
        return playbook.execute()


def ask(playbook: Playbook, shown: View, console: Screen) -> None:
    """Whether the next wave may begin: at the terminal, or by a file."""
    if not sys.stdin.isatty() or not console.is_terminal:
        print(f"glm-fleet: to go on: echo yes > {playbook.approval_file}; to halt: echo no > ...", file=sys.stderr)
        return
    # Whoever ends the run here has said no; what else a signal asks for is acted on afterwards.
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    answer = False
    try:
        with shown.paused():
            answer = click.confirm("This wave serves, verified. Go on with the next one?", err=True)
    except (click.Abort, KeyboardInterrupt, OSError):
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        approve(playbook, answer)
