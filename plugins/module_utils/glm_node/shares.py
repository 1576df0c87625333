"""Scatter and gather: which node brings which file of a checkpoint from the hub, and whom it asks for the others.

With S bytes, N nodes, H bytes/s of the hub for a node and L bytes/s of a node's link, all of it takes at least
max(S / (N H), S / L). The plan follows from the list of files and of nodes alone, so that it is the same on every node
and at every run; what the nodes have by now, and who is gone, is what the calls are told.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence


class Plan:
    """Files and nodes are named by their places in the lists that it is made from."""

    def __init__(self, sizes: Sequence[int], nodes: int) -> None:
        """`sizes` in bytes. The largest file goes first, each to the node with the fewest bytes so far."""
        if nodes < 1:
            raise ValueError("a plan needs a node")
        self.sizes = list(sizes)
        self.nodes = nodes
        self.shares: list[list[int]] = [[] for _ in range(nodes)]
        load = [0] * nodes
        for file in sorted(range(len(sizes)), key=lambda file: (-sizes[file], file)):
            owner = min(range(nodes), key=lambda node: (load[node], node))
            self.shares[owner].append(file)
            load[owner] += sizes[file]
        self.owner = {file: owner for owner, share in enumerate(self.shares) for file in share}
        self.rank = {file: rank for share in self.shares for rank, file in enumerate(share)}
        self._orders: dict[int, list[int]] = {}

    def heirs(self, file: int) -> Iterator[int]:
        """Who brings the file from the hub: its owner, or who comes next where that one is gone.

        The files of one owner have different heirs, so that all others share what it leaves.
        """
        owner, rank, others = self.owner[file], self.rank[file], self.nodes - 1
        yield owner
        for step in range(others):
            yield (owner + 1 + (rank + step) % others) % self.nodes

    def order(self, node: int) -> list[int]:
        """All files, in the order in which a node asks its peers for them.

        As the owners get them from the hub, and each node begins with another owner: no one is asked by all at once.
        """
        if node not in self._orders:
            # Its own files come last: they are only asked for where others had them before.
            self._orders[node] = sorted(
                range(len(self.sizes)),
                key=lambda file: (self.rank[file], (self.owner[file] - node - 1) % self.nodes),
            )
        return self._orders[node]

    def duties(
        self,
        node: int,
        missing: Collection[int],
        held: Collection[int],
        gone: Collection[int],
        passed_over: Mapping[int, Collection[int]] | None = None,
    ) -> list[int]:
        """What a node has to bring from the hub: missing here, held by no peer, and nobody is left before it.

        Those who are gone bring nothing; those who are passed over for a file do not bring that one.
        """
        passed_over = passed_over or {}

        def first(file: int) -> int:
            return next(
                (heir for heir in self.heirs(file) if heir not in gone and heir not in passed_over.get(file, ())), node
            )

        mine = (file for file in missing if file not in held and first(file) == node)
        return sorted(mine, key=lambda file: (self.rank[file], file))

    def pick(
        self, node: int, missing: Collection[int], holders: Mapping[int, Collection[int]], busy: Collection[int]
    ) -> tuple[int, int] | None:
        """The next file to fetch and the peer to fetch it from; None where no peer that is not busy has one."""
        for file in self.order(node):
            if file not in missing:
                continue
            free = [peer for peer in holders.get(file, ()) if peer not in busy]
            if free:
                # The nearest one after this node: another one for each of those that ask.
                return file, min(free, key=lambda peer: (peer - node - 1) % self.nodes)
        return None
