"""Action plugin: check a TLS certificate with its key on the controller."""

from __future__ import annotations

import datetime
import os
import stat
from typing import Any

from ansible.errors import AnsibleError
from ansible.plugins.action import ActionBase
from ansible_collections.glm.fleet.plugins.plugin_utils.private import is_encrypted

SOON = datetime.timedelta(days=30)


class Refused(Exception):
    """What the user has to put right, in one line."""


class ActionModule(ActionBase):  # type: ignore[misc]
    """Runs on the controller alone."""

    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        _validation, args = self.validate_argument_spec(argument_spec={"path": {"type": "path", "required": True}})
        path = os.path.abspath(args["path"])
        try:
            mode = 0o600 if is_encrypted(path) else stat.S_IMODE(os.stat(path).st_mode)
            with open(self._loader.get_real_file(path), "rb") as file:  # decrypted if Ansible Vault has encrypted it
                expires = check(file.read(), mode, path)
        except (Refused, AnsibleError) as problem:
            return {**result, "failed": True, "msg": str(problem)}
        except OSError as problem:
            return {**result, "failed": True, "msg": f"{path}: {problem.strerror}"}
        left = expires - datetime.datetime.now(datetime.timezone.utc)
        if left < SOON:
            result["warnings"] = [
                f"{path}: the certificate expires on {expires:%Y-%m-%d}, in {left.days} days: renew it"
            ]
        return {**result, "changed": False, "path": path, "expires": expires.isoformat()}


def check(data: bytes, mode: int, path: str) -> datetime.datetime:
    """When the certificate expires."""
    # Not needed to load the plugin. ansible-core brings cryptography.
    from cryptography import x509  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415
        Encoding,
        PublicFormat,
        load_pem_private_key,
    )

    if mode & 0o077:
        raise Refused(f"{path} holds a private key and is open to others (mode {mode:04o}): chmod 600 {path}")
    try:
        certificate = x509.load_pem_x509_certificates(data)[0]
    except ValueError:
        raise Refused(f"{path} holds no PEM certificate: give the chain and its key in one file") from None
    try:
        key = load_pem_private_key(data, password=None)
    except TypeError:
        raise Refused(f"{path}: the private key is encrypted, give it without a passphrase") from None
    except ValueError:
        raise Refused(f"{path} holds no PEM private key: give the chain and its key in one file") from None
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if key.public_key().public_bytes(*form) != certificate.public_key().public_bytes(*form):
        raise Refused(f"{path}: the private key is not that of the first certificate")
    expires = certificate.not_valid_after_utc
    if expires <= datetime.datetime.now(datetime.timezone.utc):
        raise Refused(f"{path}: the certificate expired on {expires:%Y-%m-%d}, renew it")
    return expires
