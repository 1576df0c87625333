#!/usr/bin/python
"""Documentation of the action plugin of the same name, which runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: bundle
short_description: Make the bundle of a release on the controller
description:
  - Fetches packages with all that they depend on, the image, the weights, and what a controller needs, into one
    directory, each file once by its sha256 and in parts under 4 GiB, with one signed manifest.
  - Needs apt-get, apt-ftparchive, dpkg-deb and gpg. Goes on from what an earlier call left, and fetches nothing that is
    there.
  - Fails with one line, before anything is fetched, where a package cannot be had or the disk is too small.
  - In check mode it only says how much there is to fetch.
options:
  directory: {description: Where the bundle is or is to be., type: path, required: true}
  base: {description: Manifest of a bundle that the site has. What it names is left out., type: path, default: ""}
  key_directory: {description: GnuPG's directory with the key that signs., type: path, required: true}
  key_file: {description: Where the public key goes., type: path, required: true}
  packages:
    description:
      - For each distribution C(distribution), C(repositories), C(names) (NAME or NAME=VERSION), C(optional) (taken
        where there is one), C(somewhere) (those of them that one distribution has to have) and C(pinning),
        a package whose preferences hold from the start.
      - A repository has C(uri), C(suite), C(component), C(key_url) and C(fingerprint), or C(source), the text of a
        source; C(path) and C(key_path) are where the mirror has it and its key. The last one takes what no other has.
    type: list
    elements: dict
    required: true
  image: {description: What image_digest returned., type: dict, required: true}
  model: {description: What hub_manifest returned., type: dict, required: true}
  revision: {description: 'Its revision, as the user names it.', type: str, required: true}
  hub: {description: Address of the hub., type: str, required: true}
  hub_token: {description: Token for the hub., type: str, default: ""}
  project: {description: Directory of this collection., type: path, required: true}
  description: {description: What the manifest says of the release beside its files., type: dict, required: true}
  environment: {description: The proxy as programs read it., type: dict, default: {}}
author: glm-fleet developers (!UNKNOWN)
"""

EXAMPLES = r"""
# As role bundle calls it.
"""

RETURN = r"""
bundle:
  description: C(id), C(files), C(bytes), C(removed_bytes) and C(key_file); C(needed_bytes) alone in check mode.
  returned: success
  type: dict
"""
