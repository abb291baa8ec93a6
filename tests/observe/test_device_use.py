"""Load of the processors: shares of the time since the last reading; a GPU is asked by a thread."""

import time
from types import SimpleNamespace

import pytest
import torch

from megabatch.observe.device_use import DeviceUse

GPU = torch.device("cuda", 0)


def until(condition):
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("the thread has not measured")


def test_a_busy_process_uses_more_than_a_sleeping_one():
    use = DeviceUse(torch.device("cpu"))
    time.sleep(0.2)
    asleep = use.read()
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    busy = use.read()
    use.close()
    assert set(asleep) == {"cpu_utilization"}
    assert 0 <= asleep["cpu_utilization"] < busy["cpu_utilization"] <= 1


@pytest.fixture
def driver(monkeypatch):
    """A stand-in for the GPU's driver; counts the calls of the share."""
    calls = SimpleNamespace(shares=[20, 60], count=0, error=None)

    def utilization(device):
        assert device == GPU
        calls.count += 1
        if calls.error:
            raise calls.error
        return calls.shares[(calls.count - 1) % 2]

    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 * 2**30, 10 * 2**30))
    return calls


def test_a_gpu_is_asked_by_a_thread_and_its_samples_are_averaged(driver):
    use = DeviceUse(GPU, interval_s=0.001)
    until(lambda: driver.count >= 2)
    use.close()
    found = use.read()
    assert 0.2 <= found["gpu_utilization"] <= 0.6
    assert found["gpu_used_bytes"] == 7 * 2**30
    assert "gpu_utilization" not in use.read()  # no further sample


@pytest.mark.parametrize("error", [ModuleNotFoundError("pynvml"), RuntimeError("driver")])
def test_without_the_library_the_memory_remains_and_the_share_is_asked_for_once(driver, error):
    driver.error = error
    use = DeviceUse(GPU, interval_s=0.001)
    until(lambda: driver.count)
    until(lambda: "gpu_used_bytes" in use.read())
    time.sleep(0.02)
    use.close()
    assert driver.count == 1
    assert "gpu_utilization" not in use.read()
