"""The laboratory's cost model: its special cases are the papers' formulas, its bytes are those that were counted."""

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "netlab"))

from cost_model import Link, Network, cost

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
