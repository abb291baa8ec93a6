"""Time of an all-reduce by the alpha-beta model, with the sender's overhead as a separate term.

M bytes on a grid of X ranks per row (a host) and Y rows. A rank's link inside its host moves B_r bytes/s, a host's
link to other hosts B_c bytes/s, *shared by its X ranks*. A message takes a latency a_r or a_c, during which its rank is
free, and an overhead o, during which its rank is busy (LogP: Culler et al. 1993).

    flat ring      T = 2 (N - 1) / N * [(N - E)(a_r + o) + E (a_c + o)] + 2 (N - 1) / N * M * max(1 / B_r, e / B_c)
    torus, rings   T = 2 (X - 1)(a_r + o) + 2 (Y - 1)(a_c + o) + 2 (X - 1) / X * M / B_r + 2 (Y - 1) / Y * M / B_c
    torus, direct  T = 2 (a_r + (X - 1) o) + 2 (a_c + (Y - 1) o) + the same bytes     (our stages on gloo: every shard
                                                                                      goes to its owner in one hop)
    hierarchical   T = (X - 1 + L)(a_r + o) + 2 (Y - 1)(a_c + o)
                       + (2 (X - 1) / X + L) * M / B_r + 2 (Y - 1) / Y * M / B_c
    split torus    rows and columns at once, M / 2 each:  the larger of the two axes' times

where N = X Y, e = ring edges that leave a host (1 if ranks are numbered host by host, X if round-robin), E = e Y,
and L = ceil(log2 X), the depth of the broadcast tree. With o = 0 the ring and torus terms are the usual ones (Mikami
et al. 2018, arXiv:1811.05233, with NCCL's rings). The shared host link is our addition: the papers' hosts have a link
per axis. It gives the torus its factor X over a round-robin ring, which the split torus loses again.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """A message of m bytes takes latency_s + overhead_s + m / bytes_per_s; its sender is free during latency_s."""

    latency_s: float
    bytes_per_s: float
    overhead_s: float = 0.0

    def hop_s(self, num_messages: int = 1) -> float:
        """Returns the time until the last of `num_messages` sent at once by a rank has arrived; 0 for none."""
        return self.latency_s + num_messages * self.overhead_s if num_messages else 0.0


@dataclass(frozen=True)
class Network:
    """`row`: a rank's link to the others of its host. `column`: a host's link to other hosts, shared by its ranks.

    `direct`: reduce-scatter and all-gather send every shard directly (gloo) instead of in a ring (NCCL).
    `ring_edges_out`: edges of the flat ring that leave each host; 1 for ranks numbered host by host.
    """

    row: Link
    column: Link
    direct: bool = True
    ring_edges_out: int = 1


@dataclass(frozen=True)
class Cost:
    """Time in messages, in bytes inside hosts and in bytes between hosts; and the bytes that leave a host."""

    latency_s: float
    row_s: float
    column_s: float
    bytes_leaving_host: float
    concurrent: bool = False  # rows and columns work at the same time, for any number of chunks

    def seconds(self, num_chunks: int = 1) -> float:
        """Returns the seconds for a buffer sent as `num_chunks` chunks that follow each other through the stages.

        The slower of the two kinds of links is always busy; the other adds time only while the pipeline fills.
        """
        longer, shorter = max(self.row_s, self.column_s), min(self.row_s, self.column_s)
        return self.latency_s + longer + (0.0 if self.concurrent else shorter / num_chunks)


def cost(algorithm: str, num_bytes: float, shape: tuple[int, int], network: Network) -> Cost:
    """Returns the cost of an all-reduce of `num_bytes`, counted in the wire type, on a grid of `shape`."""
    if algorithm not in _COSTS:
        raise ValueError(f"all-reduce {algorithm!r} is unknown, needed one of {', '.join(_COSTS)}; for example 'torus'")
    return _COSTS[algorithm](num_bytes, *shape, network)


def _flat(m: float, x: int, y: int, net: Network) -> Cost:
    n = x * y
    edges_out = 0 if y == 1 else net.ring_edges_out
    rounds = 2 * (n - 1) / n
    latency = rounds * ((n - edges_out * y) * net.row.hop_s() + edges_out * y * net.column.hop_s())
    leaving = rounds * m * edges_out
    inside = rounds * m / net.row.bytes_per_s if x > 1 else 0.0
    return Cost(latency, inside, leaving / net.column.bytes_per_s, leaving, concurrent=True)


def _hierarchical(m: float, x: int, y: int, net: Network) -> Cost:
    depth = math.ceil(math.log2(x))
    latency = (x - 1 + depth) * net.row.hop_s() + 2 * (y - 1) * net.column.hop_s()
    inside = (2 * (x - 1) / x + depth) * m / net.row.bytes_per_s
    leaving = 2 * (y - 1) / y * m
    return Cost(latency, inside, leaving / net.column.bytes_per_s, leaving)


def _torus(m: float, x: int, y: int, net: Network) -> Cost:
    inside = 2 * (x - 1) / x * m / net.row.bytes_per_s
    leaving = 2 * (y - 1) / y * m
    return Cost(_torus_latency(x, y, net), inside, leaving / net.column.bytes_per_s, leaving)


def _split_torus(m: float, x: int, y: int, net: Network) -> Cost:
    """The second half goes through the columns first, unreduced: all X ranks of a host send it between hosts."""
    inside = (x - 1) / x * (1 + 1 / y) * m / net.row.bytes_per_s
    leaving = (y - 1) / y * (1 + x) * m
    return Cost(_torus_latency(x, y, net), inside, leaving / net.column.bytes_per_s, leaving, concurrent=True)


def _torus_latency(x: int, y: int, net: Network) -> float:
    if net.direct:
        return 2 * net.row.hop_s(x - 1) + 2 * net.column.hop_s(y - 1)
    return 2 * (x - 1) * net.row.hop_s() + 2 * (y - 1) * net.column.hop_s()


_COSTS = {"flat": _flat, "hierarchical": _hierarchical, "torus": _torus, "split_torus": _split_torus}
