"""Sizes as people write and read them."""

import pytest
import typer

from vllm_leank.cli.sizes import parse_size, readable


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("141GiB", 141 * 2**30),
        ("16 GB", 16 * 10**9),
        ("110.5gib", 221 * 2**29),
        ("512MiB", 2**29),
        ("7b", 7),
        ("0", 0),
        ("1073741824", 2**30),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1e3", "1GiBs", "1.GiB", "1,5GB", "0x10"])
def test_what_is_no_size(text):
    with pytest.raises(typer.BadParameter, match="is no size"):
        parse_size(text)


@pytest.mark.parametrize("text", ["7", "80", "0.5", "1048575"])
def test_sizes_whose_unit_is_missing(text):
    with pytest.raises(typer.BadParameter, match="has no unit; write sizes like 141GiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (1536 * 2**30, "1,536.00 GiB"),
        (2**30, "1.00 GiB"),
        (11 * 2**20, "0.01 GiB"),
        (10 * 2**20, "10.00 MiB"),
        (10**6, "0.95 MiB"),
        (2000, "1.95 KiB"),
        (7, "7 bytes"),
        (0, "0 bytes"),
    ],
)
def test_sizes_for_people(size, text):
    assert readable(size) == text
