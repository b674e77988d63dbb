"""TFRecord files of `tf.train.Example` messages, written without TensorFlow.

Two small formats, one inside the other:

- A TFRecord file is a sequence of records: payload length (uint64, little endian), masked CRC-32C
  of those eight bytes (uint32), payload, masked CRC-32C of the payload (uint32).
- The payload is the protocol-buffer message `tf.train.Example`: a map from a feature's name to one
  byte string or one integer. Names are written in sorted order, so equal features give equal bytes.

Sources: TensorFlow's guide to TFRecord, the protocol buffers encoding guide, RFC 3720 section B.4
(CRC-32C).
"""

import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_REFLECTED_CASTAGNOLI = 0x82F63B78
_ALL_ONES = np.uint32(0xFFFFFFFF)
_MASK_DELTA = np.uint32(0xA282EAD8)

# Wire type and field numbers of `tf.train.Example` and what it holds.
_LENGTH_DELIMITED = 2
_BYTES_LIST, _INT64_LIST = 1, 3

# Payloads checksummed together. The checksum is a loop over byte positions, so many equal positions
# at once is what makes it fast; the limit bounds memory.
_BATCH = 4096


def _crc_table() -> NDArray[np.uint32]:
    """CRC-32C of every single byte, without initial and final inversion."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(_REFLECTED_CASTAGNOLI), table >> 1)
    return table


_TABLE = _crc_table()


def masked_crc32c(payloads: Sequence[bytes]) -> NDArray[np.uint32]:
    """Masked CRC-32C of each payload, as TFRecord stores it.

    The mask rotates the checksum right by 15 bits and adds a constant, so that a checksum of data
    that holds checksums stays sound.

    Args:
        payloads: Byte strings of any lengths.

    Returns:
        One checksum per payload, shape `(len(payloads),)`.
    """
    lengths = np.array([len(payload) for payload in payloads], dtype=np.int64)
    longest_first = np.argsort(-lengths, kind="stable")
    columns = np.zeros((int(lengths.max(initial=0)), len(payloads)), dtype=np.uint8)
    for column, index in enumerate(longest_first):
        columns[: lengths[index], column] = np.frombuffer(payloads[index], dtype=np.uint8)
    # How many payloads reach each position: they are a prefix, because the longest come first.
    num_reaching = np.searchsorted(-lengths[longest_first], -np.arange(len(columns)), side="left")

    state = np.full(len(payloads), _ALL_ONES, dtype=np.uint32)
    for row, count in zip(columns, num_reaching, strict=True):
        live = state[:count]
        state[:count] = _TABLE[(live ^ row[:count]) & 0xFF] ^ (live >> np.uint32(8))
    crc = np.empty_like(state)
    crc[longest_first] = state ^ _ALL_ONES
    rotated = (crc >> np.uint32(15)) | (crc << np.uint32(17))
    return rotated + _MASK_DELTA  # modulo 2**32, as the format asks


def encode_example(features: Mapping[str, bytes | int]) -> bytes:
    """Serialize one `tf.train.Example`.

    Args:
        features: Value of each feature: a byte string, or an integer in [-2**63, 2**63).

    Returns:
        The serialized message.

    Raises:
        ValueError: An integer does not fit 64 bits.
    """
    entries = []
    for name in sorted(features):
        value = features[name]
        if isinstance(value, bytes):
            feature = _delimited(_BYTES_LIST, _delimited(1, value))
        else:
            if not -(2**63) <= value < 2**63:
                raise ValueError(f"feature {name!r} must fit a signed 64-bit integer, got {value}")
            # Negative integers travel as two's complement; a list of integers is packed.
            feature = _delimited(_INT64_LIST, _delimited(1, _varint(value % 2**64)))
        entry = _delimited(1, name.encode()) + _delimited(2, feature)
        entries.append(_delimited(1, entry))
    return _delimited(1, b"".join(entries))


def write_records(path: Path, payloads: Iterable[bytes]) -> list[int]:
    """Write payloads as a TFRecord file.

    Args:
        path: File to create; an existing one is an error.
        payloads: One byte string per record; consumed once, never held all at the same time.

    Returns:
        Payload length of each record, in bytes.

    Raises:
        FileExistsError: `path` exists.
    """
    written: list[int] = []
    remaining = iter(payloads)
    with path.open("xb") as file:
        while batch := list(islice(remaining, _BATCH)):
            headers = [struct.pack("<Q", len(payload)) for payload in batch]
            checksums = zip(masked_crc32c(headers), masked_crc32c(batch), strict=True)
            for header, payload, (header_crc, payload_crc) in zip(
                headers, batch, checksums, strict=True
            ):
                file.write(header + struct.pack("<I", header_crc))
                file.write(payload + struct.pack("<I", payload_crc))
            written += [len(payload) for payload in batch]
    return written


def _varint(value: int) -> bytes:
    """Base-128 little-endian encoding of a non-negative integer."""
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _delimited(field: int, content: bytes) -> bytes:
    """A length-delimited field: tag, length, content."""
    return _varint(field << 3 | _LENGTH_DELIMITED) + _varint(len(content)) + content
