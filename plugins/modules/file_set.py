#!/usr/bin/python
"""Ansible module: install a set of files, directories and links in one round trip."""

from __future__ import annotations

DOCUMENTATION = r"""
module: file_set
short_description: Install a set of files, directories and links in one round trip
description:
  - Brings files, directories, links and absent paths into the wanted state with one module call.
  - Files are replaced atomically. A file that fails its validation, or a write that fails, leaves every file of the set
    as it was.
  - Missing parent directories are created with mode 0755.
options:
  files:
    description: Files with their content. A missing final newline is added. Without I(owner) an existing owner is kept.
    type: list
    elements: dict
    default: []
    suboptions:
      path: {description: Absolute path., type: path, required: true}
      content: {description: Text of the file., type: str, required: true}
      mode: {description: Octal mode., type: str, default: "0644"}
      owner: {description: User name or id., type: str}
      group: {description: Group name or id., type: str}
      sensitive: {description: Never show the content in a diff., type: bool, default: false}
  directories:
    description: Directories that shall exist.
    type: list
    elements: dict
    default: []
    suboptions:
      path: {description: Absolute path., type: path, required: true}
      mode: {description: Octal mode., type: str, default: "0755"}
      owner: {description: User name or id., type: str}
      group: {description: Group name or id., type: str}
  links:
    description: Symbolic links, each replaced by one rename.
    type: list
    elements: dict
    default: []
    suboptions:
      path: {description: Absolute path., type: path, required: true}
      target: {description: What the link says., type: str, required: true}
  absent:
    description: Files, links or directory trees that shall not exist.
    type: list
    elements: path
    default: []
  known:
    description:
      - What M(glm.fleet.node_info) has read under C(managed). A set that is in place by it costs no round trip. What
        has changed on the node since then is not seen.
    type: dict
  validate:
    description:
      - Programs that judge a changed file before it takes its place. Files without a validation are installed first.
      - In check mode they run only if the program exists and no path of the set is new.
    type: list
    elements: dict
    default: []
    suboptions:
      path: {description: The file of the set., type: path, required: true}
      command:
        description: Arguments, with C(%s) for the new file, which keeps its base name.
        type: list
        elements: str
        required: true
author: glm-fleet developers (!UNKNOWN)
"""

EXAMPLES = r"""
- name: Install the unit and its environment
  glm.fleet.file_set:
    files:
      - path: /etc/systemd/system/example.service
        content: "{{ lookup('ansible.builtin.template', role_path ~ '/../../templates/example.service.j2') }}"
      - path: /etc/example.env
        content: "TOKEN={{ token }}"
        mode: "0600"
        sensitive: true
    validate:
      - path: /etc/systemd/system/example.service
        command: [systemd-analyze, verify, "%s"]
"""

RETURN = r"""
changed_paths:
  description: Paths that were, or in check mode would be, changed.
  type: list
  elements: str
  returned: always
"""

import contextlib
import grp
import os
import pwd
import shutil
import stat
import subprocess
import tempfile
from typing import Any, Callable

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.glm.fleet.plugins.module_utils.glm_node.mounts import mounts_below


class Refused(Exception):
    """Something that the user has to put right; its text is the one line to show."""


class QuietModule(AnsibleModule):  # type: ignore[misc]
    """Keeps contents, secrets among them, out of the node's journal and of `-vvv` output."""

    def log(self, msg: str, log_args: Any = None) -> None:
        """Would write every argument to the journal."""

    def exit_json(self, **kwargs: Any) -> None:
        super().exit_json(**{"invocation": {}, **kwargs})

    def fail_json(self, msg: str, **kwargs: Any) -> None:
        super().fail_json(msg, **{"invocation": {}, **kwargs})


class FileSet:
    """The wanted paths; `apply` brings them about, or only finds out what it would change."""

    def __init__(self, params: dict[str, Any], check: bool) -> None:
        self.params = params
        self.check = check
        self.changed: list[str] = []
        self.diff: list[dict[str, str]] = []
        self._undo: list[Callable[[], None]] = []

    def apply(self) -> None:
        commands = {item["path"]: item["command"] for item in self.params["validate"]}
        unknown = sorted(set(commands) - {item["path"] for item in self.params["files"]})
        if unknown:
            raise Refused(f"validate names {unknown[0]}, which is not among the files")
        for item in self.params["files"] + self.params["directories"] + self.params["links"]:
            if not os.path.isabs(item["path"]):
                raise Refused(f"{item['path']} is not an absolute path")
        try:
            for item in self.params["directories"]:
                self._directory(item)
            # What a validated file refers to must be there when its validator looks.
            for item in sorted(self.params["files"], key=lambda item: item["path"] in commands):
                self._file(item, commands.get(item["path"]))
            for item in self.params["links"]:
                self._link(item)
        except (Refused, OSError):
            for undo in reversed(self._undo):
                with contextlib.suppress(OSError):
                    undo()
            raise
        for path in self.params["absent"]:
            self._absent(path)

    def _file(self, item: dict[str, Any], command: list[str] | None) -> None:
        path, mode = item["path"], parse_mode(item["mode"], item["path"])
        uid, gid = self._owner(item)
        data = data_of(item["content"])
        old, old_stat = read(path)
        same = old == data
        if same and old_stat and not attributes_differ(old_stat, mode, uid, gid):
            return
        if same and old_stat:
            self._note(path, describe(old_stat), describe(old_stat, mode, uid, gid))
        elif item["sensitive"]:
            self._note(path, "(content not shown)\n" if old is not None else "", "(new content not shown)\n")
        else:
            self._note(path, (old or b"").decode(errors="replace"), data.decode())
        if not same and command:
            self._validate(path, data, command)
        if self.check:
            return
        self._parents(path)
        self._undo.append(self._restorer(path, old, old_stat))
        if old_stat:  # an owner that is not asked for stays
            uid, gid = (old_stat.st_uid if uid < 0 else uid), (old_stat.st_gid if gid < 0 else gid)
        write(path, data, mode, uid, gid)

    def _directory(self, item: dict[str, Any]) -> None:
        path, mode = item["path"], parse_mode(item["mode"], item["path"])
        uid, gid = self._owner(item)
        now = os.stat(path) if os.path.exists(path) else None
        if now and not stat.S_ISDIR(now.st_mode):
            raise Refused(f"{path} is there and is not a directory: move it away")
        if now and not attributes_differ(now, mode, uid, gid):
            return
        self._note(path, describe(now), describe(now, mode, uid, gid))
        if self.check:
            return
        if now:
            self._undo.append(lambda: set_attributes(path, stat.S_IMODE(now.st_mode), now.st_uid, now.st_gid))
        else:
            self._parents(path)
            os.mkdir(path)
            self._undo.append(lambda: os.rmdir(path))
        set_attributes(path, mode, uid, gid)

    def _link(self, item: dict[str, Any]) -> None:
        path, target = item["path"], item["target"]
        now = os.readlink(path) if os.path.islink(path) else None
        if now == target:
            return
        if now is None and os.path.lexists(path):
            raise Refused(f"{path} is there and is not a link: move it away")
        self._note(path, f"link to {now}\n" if now else "", f"link to {target}\n")
        if self.check:
            return
        self._parents(path)
        self._undo.append(lambda: make_link(path, now) if now is not None else os.unlink(path))
        make_link(path, target)

    def _absent(self, path: str) -> None:
        if not os.path.lexists(path):
            return
        mounted = mounts_below(path)
        if mounted:
            # It may be shared with others, who use what is there.
            raise Refused(f"{path} has a file system mounted in it at {mounted[0]}: unmount that first, or keep {path}")
        self._note(path, "present\n", "")
        if self.check:
            return
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)

    def _note(self, path: str, before: str, after: str) -> None:
        self.changed.append(path)
        self.diff.append({"before_header": path, "after_header": path, "before": before, "after": after})

    def _owner(self, item: dict[str, Any]) -> tuple[int, int]:
        return (
            self._id(item, "owner", "user", lambda name: pwd.getpwnam(name).pw_uid),
            self._id(item, "group", "group", lambda name: grp.getgrnam(name).gr_gid),
        )

    def _id(self, item: dict[str, Any], key: str, kind: str, look_up: Callable[[str], int]) -> int:
        """-1 is the system calls' own "leave it"."""
        name = item[key]
        if name is None:
            return -1
        if name.isdigit():
            return int(name)
        try:
            return look_up(name)
        except KeyError:
            if self.check:  # a package that is still to come brings it
                return -1
            raise Refused(f"{item['path']}: there is no {kind} {name} on this node") from None

    def _parents(self, path: str) -> None:
        parent = os.path.dirname(path)
        if not os.path.isdir(parent):
            self._parents(parent)
            os.mkdir(parent)
            os.chmod(parent, 0o755)  # noqa: S103  whatever the umask is
            self._undo.append(lambda: os.rmdir(parent))

    def _validate(self, path: str, data: bytes, command: list[str]) -> None:
        if self.check and (self._new_paths_besides(path) or not shutil.which(command[0])):
            return
        directory = tempfile.mkdtemp(prefix="file_set.")
        try:
            candidate = os.path.join(directory, os.path.basename(path))
            write(candidate, data, 0o600, -1, -1)
            argv = [part.replace("%s", candidate) for part in command]
            try:
                done = subprocess.run(argv, capture_output=True, text=True, errors="replace", check=False, timeout=60)
            except FileNotFoundError:
                raise Refused(f"{path}: its validator {command[0]} is not installed") from None
            except subprocess.TimeoutExpired:
                raise Refused(f"{path}: its validator {command[0]} took more than 60 s") from None
            if done.returncode:
                said = " / ".join(line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip())
                said = said.replace(candidate, path)
                raise Refused(f"{path}: {command[0]} refuses the new content: {said[:600] or 'no message'}")
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _new_paths_besides(self, path: str) -> bool:
        return any(changed != path and not os.path.lexists(changed) for changed in self.changed)

    @staticmethod
    def _restorer(path: str, old: bytes | None, old_stat: os.stat_result | None) -> Callable[[], None]:
        if old is None or old_stat is None:
            return lambda: os.unlink(path)
        mode, uid, gid = stat.S_IMODE(old_stat.st_mode), old_stat.st_uid, old_stat.st_gid
        return lambda: write(path, old, mode, uid, gid)


def data_of(content: str) -> bytes:
    """What a file holds, a missing final newline added."""
    return (content if content.endswith("\n") or not content else content + "\n").encode()


def parse_mode(mode: str, path: str) -> int:
    try:
        return int(mode, 8)
    except ValueError:
        raise Refused(f"{path}: mode {mode!r} is not octal, write it as '0644'") from None


def read(path: str) -> tuple[bytes | None, os.stat_result | None]:
    """Content and status of a regular file; a link counts as no file, and is replaced by one."""
    try:
        now = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None, None
    if stat.S_ISLNK(now.st_mode):
        return None, None
    if not stat.S_ISREG(now.st_mode):
        raise Refused(f"{path} is there and is not a file: move it away")
    with open(path, "rb") as file:
        return file.read(), now


def write(path: str, data: bytes, mode: int, uid: int, gid: int) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=".file_set.", dir=os.path.dirname(path))
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            os.fchown(file.fileno(), uid, gid)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def make_link(path: str, target: str) -> None:
    temporary = f"{path}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    os.symlink(target, temporary)
    os.replace(temporary, path)


def attributes_differ(now: os.stat_result, mode: int, uid: int, gid: int) -> bool:
    return stat.S_IMODE(now.st_mode) != mode or uid not in (-1, now.st_uid) or gid not in (-1, now.st_gid)


def describe(now: os.stat_result | None, mode: int | None = None, uid: int = -1, gid: int = -1) -> str:
    """One line for a diff: what is there, with what is asked for in its place."""
    if now is None:
        return "" if mode is None else f"mode {mode:04o}\n"
    mode = stat.S_IMODE(now.st_mode) if mode is None else mode
    return f"mode {mode:04o}, owner {now.st_uid if uid < 0 else uid}:{now.st_gid if gid < 0 else gid}\n"


def set_attributes(path: str, mode: int, uid: int, gid: int) -> None:
    os.chown(path, uid, gid)
    os.chmod(path, mode)


def main() -> None:
    owned = {"mode": {"type": "str"}, "owner": {"type": "str"}, "group": {"type": "str"}}
    module = QuietModule(
        argument_spec={
            "files": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    **owned,
                    "mode": {"type": "str", "default": "0644"},
                    "path": {"type": "path", "required": True},
                    "content": {"type": "str", "required": True},
                    "sensitive": {"type": "bool", "default": False},
                },
            },
            "directories": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    **owned,
                    "mode": {"type": "str", "default": "0755"},
                    "path": {"type": "path", "required": True},
                },
            },
            "links": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {"path": {"type": "path", "required": True}, "target": {"type": "str", "required": True}},
            },
            "absent": {"type": "list", "elements": "path", "default": []},
            "known": {"type": "dict"},  # of the action plugin, which takes it out
            "validate": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "path": {"type": "path", "required": True},
                    "command": {"type": "list", "elements": "str", "required": True},
                },
            },
        },
        supports_check_mode=True,
    )
    file_set = FileSet(module.params, module.check_mode)
    try:
        file_set.apply()
    except Refused as problem:
        module.fail_json(str(problem))
    except OSError as problem:
        module.fail_json(f"{problem.filename or 'a file of the set'}: {problem.strerror}")
    module.exit_json(changed=bool(file_set.changed), changed_paths=file_set.changed, diff=file_set.diff)


if __name__ == "__main__":
    main()
