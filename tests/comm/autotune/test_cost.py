"""The cost model: its special cases are the papers' formulas, its bytes are those that were counted."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabatch.comm.autotune.cost import Link, Network, cost, crossover_bytes, lower_bound_s

SIDES = st.integers(2, 64)
MEGABYTE = 1e6


@given(x=SIDES, y=SIDES, m=st.floats(1, 1e9), alpha=st.floats(0, 1e-2), beta=st.floats(1e-12, 1e-6))
def test_on_equal_links_with_rings_the_torus_has_the_hops_of_the_paper(x, y, m, alpha, beta):
    link = Link(alpha, 1 / beta)
    torus = cost("torus", m, (x, y), Network(link, link, direct=False))
    assert torus.latency_s == pytest.approx((2 * (x - 1) + 2 * (y - 1)) * alpha)
    assert torus.row_s == pytest.approx(2 * (x - 1) / x * m * beta)


@given(n=SIDES, m=st.floats(1, 1e9), alpha=st.floats(0, 1e-2), beta=st.floats(1e-12, 1e-6))
def test_one_rank_per_host_makes_flat_the_ring_of_the_textbook(n, m, alpha, beta):
    ring = cost("flat", m, (1, n), Network(Link(0, 1e99), Link(alpha, 1 / beta)))
    assert ring.seconds() == pytest.approx(2 * (n - 1) * alpha + 2 * (n - 1) / n * m * beta)


@pytest.mark.parametrize(
    ("algorithm", "edges_out", "megabytes"),
    [("flat", 1, 175), ("flat", 2, 350), ("torus", 1, 150), ("hierarchical", 1, 150), ("split_torus", 1, 225)],
)
def test_bytes_leaving_a_host_of_four_by_two_are_those_counted_on_interfaces(algorithm, edges_out, megabytes):
    network = Network(Link(1e-4, 1e9), Link(1e-4, 1e8), ring_edges_out=edges_out)
    assert cost(algorithm, 100 * MEGABYTE, (2, 4), network).bytes_leaving_host == pytest.approx(megabytes * MEGABYTE)


@given(x=SIDES, y=SIDES, m=st.floats(1e3, 1e9))
def test_against_a_round_robin_ring_the_torus_saves_bandwidth_by_more_than_half_the_ranks_per_host(x, y, m):
    network = Network(Link(0, 1e99), Link(0, 1e8), ring_edges_out=x)
    saving = cost("flat", m, (x, y), network).seconds() / cost("torus", m, (x, y), network).seconds()
    assert saving == pytest.approx(x * (1 - 1 / (x * y)) / (1 - 1 / y))


@given(algorithm=st.sampled_from(["torus", "hierarchical"]), chunks=st.integers(1, 1000))
def test_more_chunks_hide_the_faster_links_behind_the_slower(algorithm, chunks):
    made = cost(algorithm, 1e8, (4, 4), Network(Link(0, 4e8), Link(0, 1e8)))
    longest = max(made.row_s, made.column_s)
    assert longest <= made.seconds(chunks) <= made.seconds(1) == pytest.approx(made.row_s + made.column_s)


@given(x=SIDES, y=SIDES, latency=st.floats(0, 1e-2), overhead=st.floats(0, 1e-4))
def test_a_direct_exchange_waits_one_latency_and_pays_each_message(x, y, latency, overhead):
    link = Link(latency, 1e9, overhead)
    made = cost("torus", 0, (x, y), Network(link, link, direct=True))
    assert made.seconds() == pytest.approx(4 * latency + (2 * (x - 1) + 2 * (y - 1)) * overhead)


def test_a_world_of_one_costs_nothing():
    network = Network(Link(1, 1), Link(1, 1))
    assert [cost(a, 1e6, (1, 1), network).seconds() for a in ("flat", "torus", "hierarchical", "split_torus")] == [
        0
    ] * 4


def test_an_unknown_algorithm_is_refused():
    with pytest.raises(ValueError, match="'torus'"):
        cost("ring", 1, (1, 2), Network(Link(1, 1), Link(1, 1)))


ALGORITHMS = ("flat", "hierarchical", "torus", "split_torus", "tree", "halving_doubling", "nccl")
COLUMNS = ("ring", "tree", "halving_doubling", "nccl")
NETWORKS = st.builds(
    Network,
    row=st.builds(Link, st.floats(0, 1e-3), st.floats(1e8, 1e12), st.floats(0, 1e-4)),
    column=st.builds(Link, st.floats(0, 1e-3), st.floats(1e8, 1e12), st.floats(0, 1e-4)),
    direct=st.booleans(),
    between_hosts=st.sampled_from(COLUMNS),
    reduce_bytes_per_s=st.floats(1e9, 1e12),
)


def test_at_1024_ranks_the_torus_takes_124_steps_and_the_ring_2046():
    link = Link(1.0, math.inf)  # a time of 1 per step
    network = Network(link, link, direct=False)
    assert cost("torus", 1, (32, 32), network).latency_s == 124
    assert cost("flat", 1, (32, 32), network).latency_s == pytest.approx(2046)


@given(
    algorithm=st.sampled_from(ALGORITHMS), x=st.integers(1, 64), y=st.integers(1, 64), m=st.floats(1, 1e9), net=NETWORKS
)
def test_no_algorithm_undercuts_the_lower_bound(algorithm, x, y, m, net):
    seconds = cost(algorithm, m, (x, y), net).seconds(10**9)  # chunks hide the faster links: the least it can be
    assert seconds >= lower_bound_s(m, (x, y), net) * (1 - 1e-9)


@given(
    algorithm=st.sampled_from(ALGORITHMS), x=SIDES, y=SIDES, m=st.floats(1, 1e9), net=NETWORKS, factor=st.floats(1, 100)
)
def test_more_bytes_or_slower_links_never_take_less_time(algorithm, x, y, m, net, factor):
    def slower(link):
        return Link(factor * link.latency_s, link.bytes_per_s / factor, link.overhead_s)

    base = cost(algorithm, m, (x, y), net).seconds()
    assert cost(algorithm, factor * m, (x, y), net).seconds() >= base * (1 - 1e-9)
    changed = replace(net, row=slower(net.row), column=slower(net.column))
    assert cost(algorithm, m, (x, y), changed).seconds() >= base * (1 - 1e-9)


@given(x=SIDES, y=SIDES, m=st.floats(1, 1e9))
def test_a_tree_has_fewer_steps_than_a_ring_and_at_most_twice_its_bytes(x, y, m):
    net = Network(Link(1e-6, 1e10), Link(1e-5, 1e10), direct=False)
    tree, ring = cost("tree", m, (x, y), net), cost("flat", m, (x, y), net)
    assert tree.latency_s <= ring.latency_s * (1 + 1e-9)
    assert ring.bytes_leaving_host <= tree.bytes_leaving_host <= 2 * ring.bytes_leaving_host


@given(k=st.integers(1, 6), m=st.floats(1, 1e9), alpha=st.floats(0, 1e-3), beta=st.floats(1e-12, 1e-6))
def test_halving_doubling_on_equal_links_is_the_textbook_formula(k, m, alpha, beta):
    link = Link(alpha, 1 / beta)
    made = cost("halving_doubling", m, (1, 2**k), Network(link, link))
    assert made.seconds() == pytest.approx(2 * k * alpha + 2 * (2**k - 1) / 2**k * m * beta)


@pytest.mark.parametrize("between", COLUMNS)
def test_the_sum_costs_each_received_byte_once(between):
    net = Network(Link(0, math.inf), Link(0, math.inf), between_hosts=between, reduce_bytes_per_s=1e9)
    assert cost("torus", 1e9, (4, 2), net).seconds() == pytest.approx(7 / 8)


@given(x=SIDES, y=SIDES, m=st.floats(1, 1e9), net=NETWORKS)
def test_nccl_is_the_faster_of_ring_and_tree(x, y, m, net):
    def seconds(algorithm, between):
        return cost(algorithm, m, (x, y), replace(net, between_hosts=between)).seconds()

    assert seconds("nccl", "ring") == min(seconds("flat", "ring"), seconds("tree", "ring"))
    assert seconds("torus", "nccl") == min(seconds("torus", "ring"), seconds("torus", "tree"))


def test_from_the_crossover_on_a_ring_is_faster_than_a_tree():
    """Ring 30 a + 15 / 8 M b, tree 8 a + 2 M b: equal at M = 22 a / (b / 8)."""
    link = Link(1e-5, 1e9)
    network = Network(link, link)
    size = crossover_bytes("tree", "flat", (1, 16), network)
    assert size == pytest.approx(22 * 1e-5 * 8 * 1e9)
    assert crossover_bytes("flat", "tree", (1, 16), network) == math.inf
    assert crossover_bytes("flat", "torus", (4, 4), replace(network, direct=False)) == math.inf
