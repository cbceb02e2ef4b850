"""The table of chips: complete, in proportion, and found by name."""

from __future__ import annotations

import pytest

from fastproj.bench.traffic.chips import CHIPS, GIB, MIB, chip_of, find_chip

NAMES = ("A100", "H100", "H200", "B200", "RTX 4090", "RTX 5090", "MI300X")
# The GiB are of the order that drivers report, somewhat less than the name says.
DEVICES = {
    "NVIDIA A100-SXM4-80GB": ("A100", 79.2),
    "NVIDIA H100 80GB HBM3": ("H100", 79.1),
    "NVIDIA H200": ("H200", 139.8),
    "NVIDIA B200": ("B200", 178.4),
    "NVIDIA GeForce RTX 4090": ("RTX 4090", 23.5),
    "NVIDIA GeForce RTX 5090": ("RTX 5090", 31.4),
    "AMD Instinct MI300X": ("MI300X", 191.5),
    "AMD Instinct MI300X OAM": ("MI300X", 192.0),
}


def test_every_chip_is_there_with_every_rate():
    assert tuple(CHIPS) == NAMES
    for name, chip in CHIPS.items():
        assert chip.name == name
        assert set(chip.matrix_flops) == {"bf16", "fp16", "tf32", "fp32", "fp64"}
        assert min(chip.matrix_flops.values()) > 0
        # From the slowest memory of the table to the fastest, and caches from the A100's up: a slip by a
        # power of ten or by a unit falls out of these.
        assert 1e12 <= chip.memory_bytes_per_second <= 8e12
        assert 40 * MIB <= chip.l2_bytes <= 256 * MIB
        assert 100 <= chip.processors <= 304
        assert chip.source


def test_rates_are_dense_and_in_proportion():
    for chip in CHIPS.values():
        rates = chip.matrix_flops
        assert rates["bf16"] == rates["fp16"]
        # Halving the width of the operands doubles the rate on every generation here; figures are rounded.
        assert rates["bf16"] == pytest.approx(2 * rates["tf32"], rel=1e-3)
        assert rates["fp64"] <= rates["fp32"] <= rates["tf32"]
    assert CHIPS["H100"].matrix_flops["bf16"] < 1e15 < CHIPS["MI300X"].matrix_flops["bf16"]


def test_the_generations_of_one_maker_are_ordered():
    bandwidths = [CHIPS[name].memory_bytes_per_second for name in ("A100", "H100", "H200", "B200")]
    assert bandwidths == sorted(set(bandwidths))
    assert CHIPS["H200"].matrix_flops == CHIPS["H100"].matrix_flops
    assert CHIPS["RTX 5090"].memory_bytes_per_second > CHIPS["RTX 4090"].memory_bytes_per_second


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_is_its_chip(device: str):
    name, memory = DEVICES[device]
    assert chip_of(device) is chip_of(device, int(memory * GIB)) is CHIPS[name]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("share", [0.5, 0.8, 1.2])
def test_a_device_with_other_memory_is_none_of_them(device: str, share: float):
    """A part of a partitioned device, H100 of 64 and of 96 GB, A100 of 40 and of 64 GB."""
    assert chip_of(device, int(share * DEVICES[device][1] * GIB)) is None


@pytest.mark.parametrize(
    "device",
    [
        *("NVIDIA A10", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA A100-SXM4-40GB", "NVIDIA GB200", ""),
        *("NVIDIA GeForce RTX 5090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "AMD Instinct MI300A"),
        *("NVIDIA H100 80GB HBM2e", "NVIDIA H100 64GB HBM2", "NVIDIA H100 96GB HBM3", "NVIDIA A100-SXM-64GB"),
    ],
)
def test_a_device_with_other_figures_is_none_of_them(device: str):
    assert chip_of(device) is None


def test_a_chip_is_found_in_any_case_and_an_unknown_one_names_the_known():
    assert find_chip("rtx 4090") is CHIPS["RTX 4090"]
    with pytest.raises(ValueError, match=r"H100, H200.*got 'V100'"):
        find_chip("V100")
