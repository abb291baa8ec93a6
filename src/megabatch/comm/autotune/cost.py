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
    tree           T = 2 (X - 1)(a_r + o) + 2 log2(Y)(a_c + o) + 2 M * max(1 / B_r, 1 / B_c)     (NCCL's double tree:
                                                                 a chain in each host, two binary trees of hosts)
    halving        T = 2 log2(X)(a_r + o) + 2 log2(Y)(a_c + o) + 2 (X - 1) / X * M / B_r + 2 (Y - 1) / Y * M / B_c
      -doubling        (Thakur et al. 2005: the long distances first, so that 1 / X of the buffer leaves a rank's host)

where N = X Y, e = ring edges that leave a host (1 if ranks are numbered host by host, X if round-robin), E = e Y,
and L = ceil(log2 X), the depth of the broadcast tree; log2 is rounded up. With o = 0 the ring and torus terms are the
usual ones (Mikami et al. 2018, arXiv:1811.05233, with NCCL's rings). The shared host link is our addition: the papers'
hosts have a link per axis. It gives the torus its factor X over a round-robin ring, which the split torus loses again.

With `between_hosts` the all-reduce of a torus or hierarchical algorithm among hosts is a tree or halving-doubling
instead of a ring. "nccl" is the faster of ring and tree, between hosts or over all ranks (NCCL 2.4 and newer). Each
sum of two values costs `1 / reduce_bytes_per_s` a byte that a rank receives.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

BetweenHosts = Literal["ring", "tree", "halving_doubling", "nccl"]


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
    `between_hosts`: the all-reduce among hosts within torus and hierarchical.
    `reduce_bytes_per_s`: rate at which a rank adds received bytes to its own.
    """

    row: Link
    column: Link
    direct: bool = True
    ring_edges_out: int = 1
    between_hosts: BetweenHosts = "ring"
    reduce_bytes_per_s: float = math.inf


@dataclass(frozen=True)
class Cost:
    """Time of an all-reduce inside hosts (row) and between hosts (column), and the bytes that leave a host."""

    row_latency_s: float
    column_latency_s: float
    row_s: float  # bytes over bandwidth
    column_s: float
    bytes_leaving_host: float
    concurrent: bool = False  # rows and columns work at the same time, for any number of chunks
    reduce_s: float = 0.0

    @property
    def latency_s(self) -> float:
        """Time of all messages in sequence, without their bytes."""
        return self.row_latency_s + self.column_latency_s

    def seconds(self, num_chunks: int = 1) -> float:
        """Returns the seconds for a buffer sent as `num_chunks` chunks that follow each other through the stages.

        The slower of the two kinds of links is always busy; the other adds time only while the pipeline fills.
        """
        longer, shorter = max(self.row_s, self.column_s), min(self.row_s, self.column_s)
        return self.latency_s + longer + (0.0 if self.concurrent else shorter / num_chunks) + self.reduce_s


def cost(algorithm: str, num_bytes: float, shape: tuple[int, int], network: Network) -> Cost:
    """Returns the cost of an all-reduce of `num_bytes`, counted in the wire type, on a grid of `shape`."""
    if algorithm not in _COSTS:
        raise ValueError(f"all-reduce {algorithm!r} is unknown, needed one of {', '.join(_COSTS)}; for example 'torus'")
    if network.between_hosts == "nccl":
        choices = [cost(algorithm, num_bytes, shape, replace(network, between_hosts=name)) for name in _NCCL]
        return min(choices, key=Cost.seconds)
    return _COSTS[algorithm](num_bytes, *shape, network)


def lower_bound_s(num_bytes: float, shape: tuple[int, int], network: Network) -> float:
    """Returns a time that no all-reduce of `num_bytes` on a grid of `shape` can undercut.

    It is the largest of three bounds. Latency: where a rank sends one message at a time, a value needs ceil(log2 Y) in
    sequence to reach all hosts, and one inside a host if X > 1; sent directly (`direct`), one each. Bandwidth of a
    host: 2 (Y - 1) / Y M bytes leave and enter it. Bandwidth of a rank: it sends 2 (N - 1) / N M bytes in all, over
    its own link and its host's (Patarasu and Yuan 2009).
    """
    x, y = shape
    n = x * y
    steps_out = min(1, y - 1) if network.direct else _log2(y)
    hops = min(1, x - 1) * network.row.hop_s() + steps_out * network.column.hop_s()
    host = 2 * (y - 1) / y * num_bytes / network.column.bytes_per_s
    both = (network.row.bytes_per_s if x > 1 else 0.0) + (network.column.bytes_per_s if y > 1 else 0.0)
    rank = 2 * (n - 1) / n * num_bytes / both if n > 1 else 0.0
    return max(hops, host, rank)


def crossover_bytes(first: str, second: str, shape: tuple[int, int], network: Network) -> float:
    """Returns the size of a buffer from which on `second` is faster than `first`; infinite if it never is.

    Times are linear in the size. Both must be algorithms of `cost` other than those that choose between two ("nccl").
    """
    one, other = (cost(name, 0.0, shape, network).seconds() for name in (first, second))
    size = 2.0**40
    per_byte = [
        (cost(name, size, shape, network).seconds() - at_0) / size for name, at_0 in ((first, one), (second, other))
    ]
    if other <= one:
        return 0.0 if per_byte[1] <= per_byte[0] else math.inf
    return (other - one) / (per_byte[0] - per_byte[1]) if per_byte[1] < per_byte[0] else math.inf


def _flat(m: float, x: int, y: int, net: Network) -> Cost:
    n = x * y
    edges_out = 0 if y == 1 else net.ring_edges_out
    rounds = 2 * (n - 1) / n
    leaving = rounds * m * edges_out
    inside = rounds * m / net.row.bytes_per_s if x > 1 else 0.0
    return Cost(
        rounds * (n - edges_out * y) * net.row.hop_s(),
        rounds * edges_out * y * net.column.hop_s(),
        inside,
        leaving / net.column.bytes_per_s,
        leaving,
        concurrent=True,
        reduce_s=_reduce_s(m, n, net),
    )


def _tree(m: float, x: int, y: int, net: Network) -> Cost:
    leaving = 2 * m if y > 1 else 0.0
    inside = 2 * m / net.row.bytes_per_s if x > 1 else 0.0
    latencies = 2 * (x - 1) * net.row.hop_s(), 2 * _log2(y) * net.column.hop_s()
    through = leaving / net.column.bytes_per_s
    return Cost(*latencies, inside, through, leaving, concurrent=True, reduce_s=_reduce_s(m, x * y, net))


def _halving_doubling(m: float, x: int, y: int, net: Network) -> Cost:
    inside = 2 * (x - 1) / x * m / net.row.bytes_per_s
    leaving = 2 * (y - 1) / y * m
    latencies = 2 * _log2(x) * net.row.hop_s(), 2 * _log2(y) * net.column.hop_s()
    return Cost(*latencies, inside, leaving / net.column.bytes_per_s, leaving, reduce_s=_reduce_s(m, x * y, net))


def _hierarchical(m: float, x: int, y: int, net: Network) -> Cost:
    depth = _log2(x)
    inside = (2 * (x - 1) / x + depth) * m / net.row.bytes_per_s
    leaving = _column_bytes(m, y, net)
    latencies = (x - 1 + depth) * net.row.hop_s(), _column_hops(y, net) * net.column.hop_s()
    reduce_s = _reduce_s(m, x, net) + _reduce_s(m, y, net)
    return Cost(*latencies, inside, leaving / net.column.bytes_per_s, leaving, reduce_s=reduce_s)


def _torus(m: float, x: int, y: int, net: Network) -> Cost:
    inside = 2 * (x - 1) / x * m / net.row.bytes_per_s
    leaving = _column_bytes(m, y, net)
    column_s = leaving / net.column.bytes_per_s
    return Cost(*_torus_latencies(x, y, net), inside, column_s, leaving, reduce_s=_reduce_s(m, x * y, net))


def _split_torus(m: float, x: int, y: int, net: Network) -> Cost:
    """The second half goes through the columns first, unreduced: all X ranks of a host send it between hosts."""
    inside = (x - 1) / x * (1 + 1 / y) * m / net.row.bytes_per_s
    leaving = (y - 1) / y * (1 + x) * m
    latencies = _torus_latencies(x, y, net)
    through = leaving / net.column.bytes_per_s
    return Cost(*latencies, inside, through, leaving, concurrent=True, reduce_s=_reduce_s(m, x * y, net))


def _torus_latencies(x: int, y: int, net: Network) -> tuple[float, float]:
    if net.direct:
        return 2 * net.row.hop_s(x - 1), 2 * net.column.hop_s(y - 1)
    return 2 * (x - 1) * net.row.hop_s(), _column_hops(y, net) * net.column.hop_s()


def _column_hops(y: int, net: Network) -> int:
    """Messages in sequence of the all-reduce among `y` hosts."""
    return 2 * (y - 1) if net.between_hosts == "ring" else 2 * _log2(y)


def _column_bytes(m: float, y: int, net: Network) -> float:
    """Bytes that leave a host in the all-reduce among `y` hosts; a tree's inner hosts send the whole buffer twice."""
    if net.between_hosts == "tree":
        return 2 * m if y > 1 else 0.0
    return 2 * (y - 1) / y * m


def _reduce_s(m: float, n: int, net: Network) -> float:
    return (n - 1) / n * m / net.reduce_bytes_per_s


def _log2(n: int) -> int:
    """log2 of `n`, rounded up."""
    return (n - 1).bit_length()


def _nccl(m: float, x: int, y: int, net: Network) -> Cost:
    return min(_flat(m, x, y, net), _tree(m, x, y, net), key=Cost.seconds)


_NCCL: tuple[BetweenHosts, ...] = ("ring", "tree")
_COSTS = {
    "flat": _flat,
    "hierarchical": _hierarchical,
    "torus": _torus,
    "split_torus": _split_torus,
    "tree": _tree,
    "halving_doubling": _halving_doubling,
    "nccl": _nccl,
}
