"""Hardware as data: the package's file is consistent, a user's file adds to it, mistakes are refused with a remedy."""

import pytest

from megabatch.errors import SettingsError
from megabatch.plan.hardware import load_hardware

MINE = """
[cluster.mine]
stack = "h200/torch"
devices_per_host = 2
row = "pcie4"
host_link = "ethernet_10"
price_per_device_hour = 2.5
"""


def test_the_named_clusters_and_devices_of_the_papers_are_there():
    hardware = load_hardware()
    assert {"mn1", "abci", "tpu_v3_pod", "stampede2_knl", "stampede2_skx", "dgx_h100"} <= set(hardware.cluster)
    assert {"v100", "p100", "a100_40", "h100", "h200", "tpu_v3", "knl_7250", "skylake_8160"} <= set(hardware.device)


def test_every_row_that_a_stack_is_fitted_to_is_of_one_host_or_the_smallest_slice():
    """No cluster's host has more devices; the TPU stack states that its 16 chips are the smallest published slice."""
    hardware = load_hardware()
    most = dict.fromkeys(hardware.stack, 8) | {"tpu_v3/tensorflow": 16}
    assert all(row.workers <= most[name] for name, stack in hardware.stack.items() for row in stack.rows)


def test_a_users_file_adds_a_cluster_and_keeps_the_others(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(MINE)
    hardware = load_hardware(path)
    assert hardware.find_cluster("mine").price_per_device_hour == 2.5
    assert hardware.find_cluster("abci") == load_hardware().find_cluster("abci")


def test_an_unknown_cluster_is_refused_with_the_known_ones():
    with pytest.raises(SettingsError, match=r"'abcl' is unknown.*stampede2_knl.*try abci"):
        load_hardware().find_cluster("abcl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[cluster.a]\nspeed = 1", "unknown fields speed; known: stack"),
        ('[cluster.a]\nstack = "h100/mxnet"', "devices_per_host"),
        ('[cluster.a]\nstack = "x100"\ndevices_per_host = 1', "stack of cluster 'a', 'x100' is unknown"),
        (MINE.replace('"pcie4"', '"pcie9"'), "link of cluster 'mine', 'pcie9' is unknown"),
        (MINE.replace('row = "pcie4"', ""), "row = 'pcie3' works"),
        (MINE.replace("= 2\n", '= "2"\n'), "needed a number of at least 0"),
        ('[stack.s]\ndevice = "h100"\nprecision = "fp8"', "no flops for 'fp8'"),
        ('[stack.s]\ndevice = "h100"\nprecision = "fp16"', "has no rows"),
        ("[clusters.a]", "table .clusters. is unknown"),
        ("cluster = ", "needed a TOML file"),
    ],
)
def test_a_mistake_in_a_users_file_is_refused_with_what_was_needed(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=message):
        load_hardware(path)
