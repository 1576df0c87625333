"""What modules and the nodes' programs share: the standard library alone, for Python 3.9 and newer.

A role installs the whole package beside its programs (filter node_package): what one role brings does not change what
another role's programs import.
"""
