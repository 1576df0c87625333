"""Documentation of the action plugin of the same name, which runs on the controller."""

DOCUMENTATION = r"""
module: tls_certificate
short_description: Check a TLS certificate with its key on the controller
description:
  - Refuses a PEM file that others can read, that lacks the certificate or the key, whose key is encrypted or belongs to
    another certificate, or that has expired. Changes nothing and costs the node nothing.
options:
  path: {description: PEM file on the controller with the certificate chain and its key., type: path, required: true}
author: glm-fleet developers (!UNKNOWN)
"""

EXAMPLES = r"""
- name: Check the certificate
  glm.fleet.tls_certificate:
    path: "{{ gateway_tls_certificate_file }}"
  run_once: true
"""

RETURN = r"""
path: {description: The file as an absolute path., type: str, returned: always}
expires: {description: When the certificate expires (UTC)., type: str, returned: success}
"""
