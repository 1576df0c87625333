"""The command line: the playbooks of this project with a live view, a journal of each run, and exit codes."""
