"""Kinds of devices and the figures of chips."""

import ctypes
import random
import resource

import numpy as np
import pytest
import torch

from sana_kit import devices
from sana_kit.devices import DTYPES, KINDS, chips, find_chip, memory_bandwidth, peak_flops, pick_device
from sana_kit.errors import UserError


@pytest.mark.parametrize(
    ("name", "chip"),
    [
        ("Ascend910B1", "910b1"),
        ("Ascend910B2C", "910b2"),
        ("Ascend910B3", "910b3"),
        ("Ascend910B4-1", "910b4"),
        ("910B", "910b"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100 pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A800-SXM4-80GB", "a800"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", "l40"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        # names that hold another's letters, and devices with other figures
        ("NVIDIA RTX A1000", None),
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("NVIDIA A10G", None),
        ("NVIDIA A100X", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GH200 480GB", None),
        ("Ascend910", None),
        ("Ascend310P3", None),
        ("CPU", None),
    ],
)
def test_a_chip_is_known_by_whole_words(name, chip):
    found = find_chip(name)
    assert (found.name if found else None) == chip
    assert peak_flops(name) == (chips()[chip].tflops * 1e12 if chip else None)
    assert memory_bandwidth(name) == (chips()[chip].bandwidth if chip else None)


def test_every_chip_is_found_by_its_own_name():
    for name, chip in chips().items():
        assert find_chip(name) is chip and find_chip(name.upper()) is chip
        assert 50 < chip.tflops < 3000 and 0.3e12 < chip.bandwidth < 10e12


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gpu", "unknown device. Use one of auto, cpu, "),
        ("cuda:x", "unknown device"),
        ("npu:1", "no npu device was found here. Use auto or cpu."),
    ],
)
def test_a_device_that_is_not_there_is_an_error(name, reason):
    with pytest.raises(UserError) as refused:
        pick_device(name)
    told = str(refused.value.as_flags())
    assert told.startswith(f"--device={name}: {reason}")
    assert "unknown" not in reason or all(f"{kind}, {kind}:N" in told for kind in KINDS if kind != "cpu")


class Emulated:
    """The calls of torch.cuda or torch.npu that the kit makes, for two devices."""

    def __init__(self):
        self.calls, self.state = [], torch.arange(3)

    def __getattr__(self, name):
        def call(*args):
            self.calls.append((name, args))
            answers = {
                "device_count": 2,
                "current_device": 1,
                "mem_get_info": (5, 9),
                "get_device_name": "Ascend910B3",
            }
            return answers.get(name, self.state.clone() if name == "get_rng_state" else 7)

        return call


def test_a_kind_is_one_entry(monkeypatch):
    """A new kind of accelerator needs its entry and torch's module of that name, nothing else."""
    module = Emulated()
    monkeypatch.setattr(torch, "xyz", module, raising=False)
    prepared = []
    kind = devices.DeviceKind("xyz", lambda: True, prepared.append)
    monkeypatch.setattr(devices, "KINDS", {"xyz": kind, **KINDS})

    class Device:
        type = "xyz"

    monkeypatch.setattr(torch, "device", lambda *where: (where, Device)[1])
    device = Device()
    assert devices.accelerator_type() == "xyz" and devices.device_count() == 2
    assert pick_device("auto") is Device and pick_device("xyz:1") is Device
    with pytest.raises(UserError, match="this host has 2 xyz"):
        pick_device("xyz:2")
    devices.prepare_backend(device, allow_tf32=True)
    assert prepared == [True]
    assert devices.memory_info_bytes(device) == (5, 9) and devices.free_memory_bytes(device) == 5
    assert devices.peak_memory_bytes(device) == 7 and devices.device_name(device) == "Ascend910B3"
    for act in (devices.synchronize, devices.empty_cache, devices.reset_peak_memory):
        act(device)
    devices.seed_everything(3)
    state = devices.random_state(device)
    devices.set_random_state(state, device)
    called = [name for name, _ in module.calls]
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "manual_seed_all", "set_rng_state"):
        assert name in called


def test_random_state_of_the_host_comes_back():
    device = torch.device("cpu")
    devices.seed_everything(11)
    state = devices.random_state(device)
    first = random.random(), np.random.rand(), torch.rand(1).item()
    devices.set_random_state(state, device)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == first


def test_the_cpu_is_always_there():
    assert pick_device("cpu") == torch.device("cpu") and DTYPES["bf16"] is torch.bfloat16
    assert devices.peak_memory_bytes(torch.device("cpu")) > 1e7
    assert devices.free_memory_bytes(torch.device("cpu")) > 0


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_a_cpu_keeps_the_memory_of_freed_tensors():
    """Tensors taken again cost no page fault; four of 30 MiB cost 30,720 each time where glibc is left alone."""
    devices.keep_freed_memory(torch.device("cpu"))

    def faults_of_a_step():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(30 * 2**18) for _ in range(4)]
        del tensors
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert [faults_of_a_step() for _ in range(6)][-1] < 1000
