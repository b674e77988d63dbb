"""TFRecord files and example messages against plain references and published values."""

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads_smoke.tfrecord import encode_example, masked_crc32c, write_records


def crc32c(data: bytes) -> int:
    """Bit by bit, as the polynomial division that CRC-32C is."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_records(path: Path) -> list[bytes]:
    """Every payload of a TFRecord file; raises if a checksum or a length is wrong."""
    data, payloads = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        header_crc, payload = struct.unpack("<I", data[8:12])[0], data[12 : 12 + length]
        (payload_crc,) = struct.unpack("<I", data[12 + length : 16 + length])
        assert header_crc == masked(crc32c(data[:8]))
        assert payload_crc == masked(crc32c(payload))
        payloads.append(payload)
        data = data[16 + length :]
    return payloads


def decode_example(message: bytes) -> dict[str, bytes | int]:
    """Features of an example with one value each, by a general reader of the wire format."""
    (features,) = fields(message, 1)
    decoded: dict[str, bytes | int] = {}
    for entry in fields(features, 1):
        (name,), (feature,) = fields(entry, 1), fields(entry, 2)
        if byte_lists := fields(feature, 1):
            (decoded[name.decode()],) = fields(byte_lists[0], 1)
        else:
            (packed,) = fields(fields(feature, 3)[0], 1)
            value, rest = read_varint(packed)
            assert rest == b""
            decoded[name.decode()] = value - 2**64 if value >= 2**63 else value
    return decoded


def fields(message: bytes, number: int) -> list[bytes]:
    """Contents of the length-delimited fields of one number; there are no other wire types."""
    found = []
    while message:
        tag, message = read_varint(message)
        assert tag & 7 == 2
        length, message = read_varint(message)
        if tag >> 3 == number:
            found.append(message[:length])
        assert len(message) >= length
        message = message[length:]
    return found


def read_varint(data: bytes) -> tuple[int, bytes]:
    value = 0
    for position, byte in enumerate(data):
        value |= (byte & 0x7F) << 7 * position
        if not byte & 0x80:
            return value, data[position + 1 :]
    raise ValueError("a varint has no end")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        # RFC 3720, B.4
        (bytes(32), 0x8A9136AA),
        (bytes([0xFF]) * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        # the check value of the catalogue of parametrised CRC algorithms
        (b"123456789", 0xE3069283),
        (b"", 0),
    ],
)
def test_published_checksums(data: bytes, expected: int) -> None:
    assert crc32c(data) == expected
    assert masked_crc32c([data]).tolist() == [masked(expected)]


@given(st.lists(st.binary(max_size=40), max_size=12))
def test_checksums_of_ragged_payloads_match_the_bitwise_reference(payloads: list[bytes]) -> None:
    assert masked_crc32c(payloads).tolist() == [masked(crc32c(payload)) for payload in payloads]


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=5),
        st.one_of(st.binary(max_size=300), st.integers(-(2**63), 2**63 - 1)),
    )
)
@settings(max_examples=200)
def test_examples_survive_a_round_trip(features: dict[str, bytes | int]) -> None:
    assert decode_example(encode_example(features)) == features


def test_an_example_has_the_bytes_that_tensorflow_gives_it() -> None:
    # TensorFlow 2.19: tf.train.Example with int64_list [7] under "label", SerializeToString()
    assert encode_example({"label": 7}).hex() == "0a100a0e0a056c6162656c12051a030a0107"


def test_integers_that_need_more_than_64_bits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"feature 'label' must fit a signed 64-bit integer"):
        encode_example({"label": 2**63})


def test_a_file_holds_its_records_in_order_across_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workloads_smoke.tfrecord._BATCH", 4)
    payloads = [bytes([k]) * k for k in range(11)]
    assert write_records(tmp_path / "records", iter(payloads)) == list(range(11))
    assert read_records(tmp_path / "records") == payloads


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "records").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        write_records(tmp_path / "records", [b"new"])
    assert (tmp_path / "records").read_bytes() == b"precious"
