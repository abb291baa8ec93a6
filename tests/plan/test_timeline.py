"""The timeline of a step: hand-computed schedules, bounds, monotonicity, 100,000 workers."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabatch.comm.autotune.cost import Cost, lower_bound_s
from megabatch.comm.exchange.buckets import cubic_groups
from megabatch.errors import SettingsError
from megabatch.plan.exchange import Exchange, bucket_costs, bucket_layers, grid_of, network_of
from megabatch.plan.hardware import load_hardware
from megabatch.plan.layers import layers_of, num_parameters
from megabatch.plan.timeline import exchange_end_s, step_time

HARDWARE = load_hardware()
RESNET = layers_of("resnet50")
ALGORITHMS = ("flat", "hierarchical", "torus", "split_torus", "tree", "halving_doubling", "nccl")


def timeline(workers, *, cluster="dgx_h100", local_batch=32, bn_span=1, hardware=HARDWARE, **options):
    return step_time(
        RESNET,
        local_batch=local_batch,
        bn_span=bn_span,
        num_workers=workers,
        exchange=Exchange(**options),
        cluster=hardware.find_cluster(cluster),
        hardware=hardware,
    )


def test_two_buckets_follow_each_other_through_rows_and_columns():
    """Each takes 1 s in rows, 4 s in columns, 1 s in rows. The first is ready at 0, the second at 2:

    rows 0-1, columns 1-5, rows 5-6; the second: rows 2-3, columns 5-9, rows 9-10.
    """
    bucket = Cost(0.0, 0.0, 2.0, 4.0, 0.0)
    assert exchange_end_s([0.0, 2.0], [bucket, bucket]) == 10.0


def test_concurrent_buckets_wait_for_both_links():
    bucket = Cost(0.5, 0.5, 2.0, 4.0, 0.0, concurrent=True)  # 1 s of latency and 4 s
    assert exchange_end_s([0.0, 1.0, 30.0], [bucket] * 3) == 35.0


def test_without_workers_to_exchange_with_a_step_is_computation_alone():
    made = timeline(1)
    assert made.exposed_s == made.straggler_s == made.exchange_s == 0
    assert made.efficiency == 1


@given(
    algorithm=st.sampled_from(ALGORITHMS),
    hosts=st.integers(1, 500),
    batch=st.integers(1, 256),
    cluster=st.sampled_from(["dgx_h100", "abci", "mn1", "stampede2_knl", "big_basin"]),
    overlap=st.booleans(),
)
def test_a_step_is_the_sum_of_its_parts_and_within_its_bounds(algorithm, hosts, batch, cluster, overlap):
    workers = hosts * HARDWARE.find_cluster(cluster).devices_per_host
    exchange = Exchange(algorithm=algorithm, overlap=overlap)
    made = timeline(workers, cluster=cluster, local_batch=batch, **vars(exchange))
    shape = grid_of(exchange, workers, HARDWARE.find_cluster(cluster))
    network = network_of(exchange, shape, HARDWARE.find_cluster(cluster), HARDWARE)
    bound = lower_bound_s(2 * num_parameters(RESNET), shape, network)
    compute_s = made.forward_s + made.backward_s + made.optimizer_s
    assert 0 < made.efficiency <= 1
    assert made.exposed_s <= made.exchange_s * (1 + 1e-9)
    assert made.total_s >= compute_s
    assert made.backward_s + made.exposed_s >= bound * (1 - 1e-9)


@given(
    algorithm=st.sampled_from(ALGORITHMS), hosts=st.integers(2, 400), batch=st.integers(1, 128), factor=st.floats(1, 8)
)
def test_slower_links_fewer_images_and_more_hosts_never_make_a_worker_faster(algorithm, hosts, batch, factor):
    slower = {
        name: dataclasses.replace(link, bytes_per_s=link.bytes_per_s / factor, latency_us=link.latency_us * factor)
        for name, link in HARDWARE.link.items()
    }
    changed = dataclasses.replace(HARDWARE, link=slower)
    options = {"algorithm": algorithm, "bucket": "one", "overlap": False, "local_batch": batch}
    base = timeline(8 * hosts, **options)
    almost = 1 - 1e-9
    assert timeline(8 * hosts, hardware=changed, **options).total_s >= base.total_s * almost
    assert timeline(8 * (hosts + 1), **options).total_s >= base.total_s * almost
    more = timeline(8 * hosts, **(options | {"local_batch": batch + 1}))
    assert more.total_s / (batch + 1) <= base.total_s / batch / almost


@given(hosts=st.integers(1, 400), bucket=st.sampled_from(["size", "cubic", "one"]))
def test_overlap_never_makes_a_step_longer(hosts, bucket):
    hidden, exposed = (timeline(8 * hosts, bucket=bucket, overlap=overlap).total_s for overlap in (True, False))
    assert hidden <= exposed * (1 + 1e-9)


def test_buckets_hold_every_layer_once_and_cubic_ones_are_fujitsus():
    for kind in ("size", "cubic", "one"):
        buckets = bucket_layers(RESNET, Exchange(bucket=kind))
        assert [layer for bucket in buckets for layer in bucket] == list(reversed(RESNET))
    cubic = bucket_layers(RESNET, Exchange(bucket="cubic"))
    assert len(cubic) == len(cubic_groups(161)) == 4
    sizes = [4 * num_parameters(bucket) for bucket in bucket_layers(RESNET, Exchange(bucket_mib=25.0))[:-1]]
    assert all(25 * 2**20 <= size < 37 * 2**20 for size in sizes)


def test_the_bytes_of_a_torus_on_four_hosts_of_two_are_those_counted_in_the_laboratory():
    exchange = Exchange(algorithm="torus", wire="fp32", bucket="one")
    cluster = dataclasses.replace(HARDWARE.find_cluster("xe8545"), devices_per_host=2)
    shape = grid_of(exchange, 8, cluster)
    (made,) = bucket_costs(
        bucket_layers(RESNET, exchange), exchange, shape, network_of(exchange, shape, cluster, HARDWARE)
    )
    assert made.bytes_leaving_host / (4 * num_parameters(RESNET)) == pytest.approx(1.5)


def test_spans_that_workers_share_cost_collectives_and_own_spans_cost_none():
    assert timeline(64, local_batch=32, bn_span=32).norm_s == 0
    shared, wider = (timeline(64, local_batch=32, bn_span=span).norm_s for span in (64, 256))
    assert 0 < shared < wider


def test_rows_that_span_the_hosts_of_a_leaf_pay_for_its_tapered_uplinks():
    tapered = HARDWARE.find_cluster("abci")
    flat = dataclasses.replace(tapered, taper=1.0)
    exchange = Exchange(algorithm="halving_doubling")
    networks = [network_of(exchange, (4, 512), cluster, HARDWARE) for cluster in (tapered, flat)]
    assert networks[1].column.bytes_per_s == pytest.approx(3 * networks[0].column.bytes_per_s)


def test_the_leader_of_a_host_uses_only_its_own_link():
    cluster = HARDWARE.find_cluster("dgx_h100")
    links = [network_of(Exchange(algorithm=name), (8, 8), cluster, HARDWARE) for name in ("torus", "hierarchical")]
    assert links[0].column.bytes_per_s == pytest.approx(8 * links[1].column.bytes_per_s)


def test_a_step_takes_as_long_as_the_input_of_its_host():
    slow = dataclasses.replace(HARDWARE.find_cluster("dgx_h100"), input_images_per_s=8 * 32 / 0.5)
    made = step_time(
        RESNET, local_batch=32, bn_span=1, num_workers=64, exchange=Exchange(), cluster=slow, hardware=HARDWARE
    )
    assert made.total_s == pytest.approx(0.5)
    assert made.limit == "input"
    assert timeline(64).input_s == 0


@pytest.mark.parametrize(
    ("workers", "options", "message"),
    [
        (12, {}, "12 workers do not fill hosts of 8 devices; 8 do"),
        (64, {"shape": (4, 16)}, "8 x 8 works"),
        (64, {"shape": (8, 9)}, "8 x 8 works"),
    ],
)
def test_grids_that_do_not_fit_the_hosts_are_refused(workers, options, message):
    with pytest.raises(SettingsError, match=message):
        timeline(workers, **options)


def test_the_timeline_of_100000_workers_has_as_many_events_as_that_of_8(monkeypatch):
    from megabatch.plan import timeline as module

    calls = []
    monkeypatch.setattr(module, "_stages", lambda made: calls.append(made) or [(("row",), made.seconds())])
    counts = []
    for workers in (8, 100_000):
        calls.clear()
        timeline(workers, local_batch=1)
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0
