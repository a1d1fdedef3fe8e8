"""Tensor maps: what the driver is asked, where addresses go, and when there is no map."""

import ctypes

import played_driver
import pytest
from scfa_core.backends.cupy_raw import tensor_maps

from scfa_core.arrays import DeviceArray

MARK = 0xA5C3_96E1_0000_0007


def array(shape, strides, pointer=MARK):
    return DeviceArray(pointer, shape, strides, "bfloat16", 0)


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.setattr(tensor_maps, "_encode", lambda: played_driver.encode)


def words(maps):
    return memoryview(maps).cast("Q").tolist()


def test_two_maps_with_marks_for_addresses(driver):
    """Sizes from the last axis on, strides in bytes, one swizzled panel of 32 rows a box."""
    keys = array((2, 3, 77, 96), (3 * 77 * 96, 77 * 96, 96, 1))
    rows_first = array((2, 3, 77, 96), (77 * 3 * 96, 96, 3 * 96, 1), MARK + 1)
    maps = tensor_maps.tensor_maps(keys, rows_first)
    assert len(maps) == len(tensor_maps.NO_MAPS) == 256
    row, head, batch = 192, 77 * 192, 3 * 77 * 192
    assert words(maps)[:8] == [96, 77, MARK, row, head, batch, 3, 2]
    assert words(maps)[16:24] == [96, 77, MARK + 1, 3 * 192, 192, 77 * 3 * 192, 3, 2]


def test_strides_of_axes_of_one_entry_are_not_looked_at(driver):
    odd = array((1, 1, 50, 64), (0, 7, 64, 1))
    assert words(tensor_maps.tensor_maps(odd))[3:6] == [128, 128, 128]


@pytest.mark.parametrize(
    "strides",
    [
        (50 * 64, 0, 64, 1),
        (50 * 64, -50 * 64, 64, 1),
        (0, 50 * 64, 64, 1),
        (50 * 60, 50 * 60, 60, 1),
    ],
    ids=["broadcast head", "backwards", "broadcast batch", "refused"],
)
def test_what_has_no_map(driver, strides):
    good = array((2, 2, 50, 64), (2 * 50 * 64, 50 * 64, 64, 1))
    assert tensor_maps.tensor_maps(good, good) is not None
    assert tensor_maps.tensor_maps(good, array((2, 2, 50, 64), strides)) is None


def test_addresses_in_another_form(monkeypatch):
    """What is opaque may change: then nothing is put in its place."""

    def encode(at, element, rank, address, *rest):
        return played_driver.encode(at, element, rank, ctypes.c_void_p(address.value ^ 1), *rest)

    monkeypatch.setattr(tensor_maps, "_encode", lambda: encode)
    good = array((2, 2, 50, 64), (2 * 50 * 64, 50 * 64, 64, 1))
    assert tensor_maps.tensor_maps(good) is None


def test_no_driver(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(tensor_maps.ctypes, "CDLL", missing)
    tensor_maps._encode.cache_clear()
    good = array((2, 2, 50, 64), (2 * 50 * 64, 50 * 64, 64, 1))
    assert tensor_maps.tensor_maps(good) is None
    tensor_maps._encode.cache_clear()
