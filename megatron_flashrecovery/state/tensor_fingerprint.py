"""Fingerprints of tensors, computed where they are: without bringing them to the host."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import xxhash

_LANES = 1 << 17
_FEW_LANES = 1 << 14
"""So many a tensor has before a lane gets a second word; below that, the calls cost more than what they compute."""
_WORDS_PER_LANE = 16
_WORD_NBYTES = 8
_LOW_HALF = 0xFFFFFFFF
# Congruent to 5 modulo 8, so of the largest order modulo 2**64, and -1 is none of its powers: two flipped bits never
# cancel each other.
_MULTIPLIER = -7046029254386353131 & ~7 | 5


def word_sums(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One int64 per tensor (of one device, where they stay): the sum of its words. The cheapest thing that tells a copy
    from what it should be, but for what is swapped."""
    return torch.stack([_words(tensor.detach()).sum() for tensor in tensors])


def tensors_fingerprint(tensors: Sequence[tuple[str, torch.Tensor]]) -> bytes:
    """One 128-bit digest of named tensors, computed where they are: integer arithmetic, the same on every device.

    Two ranks get the same digest if and only if (but for chance) names, order, dtypes, shapes and all bits agree, NaN
    payloads and the sign of zero included. Brings 16 bytes per tensor to the host, once per device.
    """
    described = xxhash.xxh3_128()
    for name, tensor in tensors:
        described.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\n".encode())
    # Mapped: of tensors whose words are a copy there is one at a time.
    for pair in _to_host(list(map(_digest, _together(tensor.detach() for _, tensor in tensors)))):
        described.update(pair)
    return described.digest()


def _together(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Their words. Small tensors that follow each other on one device are one: their shapes tell where each ends."""
    small: list[torch.Tensor] = []
    count = 0
    for tensor in tensors:
        size = -(-tensor.numel() * tensor.element_size() // _WORD_NBYTES)
        if small and (small[0].device != tensor.device or count + size > _FEW_LANES):
            yield torch.cat(small)
            small, count = [], 0
        if size > _FEW_LANES:
            yield _words(tensor)
        else:
            small.append(_words(tensor))
            count += size
    if small:
        yield torch.cat(small)


def _to_host(digests: Sequence[torch.Tensor]) -> Iterable[bytes]:
    by_device: dict[torch.device, list[int]] = {}
    for index, digest in enumerate(digests):
        by_device.setdefault(digest.device, []).append(index)
    found: dict[int, bytes] = {}
    for indices in by_device.values():
        rows = torch.stack([digests[index] for index in indices]).cpu()
        found.update((index, row.numpy().tobytes()) for index, row in zip(indices, rows, strict=True))
    return [found[index] for index in range(len(digests))]


def _digest(words: torch.Tensor) -> torch.Tensor:
    """Two int64: a polynomial in each of at most ``_LANES`` lanes, then two weighted sums of the lanes.

    Words are added by halves of 32 bits under multiplication modulo 2**64: added whole, two flipped sign bits would
    cancel each other whatever the weights.
    """
    count = min(len(words), _LANES, max(_FEW_LANES, len(words) // _WORDS_PER_LANE))
    lanes = torch.zeros(count, dtype=torch.int64, device=words.device)
    half = torch.empty_like(lanes)
    for start in range(0, len(words), count or 1):
        row = words[start : start + count]
        into, part = lanes[: len(row)], half[: len(row)]
        torch.bitwise_and(row, _LOW_HALF, out=part)
        into.mul_(_MULTIPLIER).add_(part)
        torch.bitwise_right_shift(row, 32, out=part)
        into.mul_(_MULTIPLIER).add_(part)
    lane = torch.arange(1, count + 1, dtype=torch.int64, device=words.device)
    mixed = _mixed(lanes)
    return torch.stack([(mixed * (_mixed(lane * salt) | 1)).sum() for salt in (0x9E3779B1, 0x85EBCA77)])


def _mixed(words: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64: every bit of a word depends on every other, and no two words become the same."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        words = (words ^ _logical_shift(words, shift)) * factor
    return words ^ _logical_shift(words, 31)


def _logical_shift(words: torch.Tensor, by: int) -> torch.Tensor:
    return (words >> by) & ((1 << (64 - by)) - 1)


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes as int64, the last word padded with zeros; a view where the memory allows one."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    if not any(number % _WORD_NBYTES for number in (len(raw), raw.data_ptr(), raw.storage_offset())):
        return raw.view(torch.int64)
    padded = torch.zeros(-(-len(raw) // _WORD_NBYTES) * _WORD_NBYTES, dtype=torch.uint8, device=raw.device)
    padded[: len(raw)] = raw
    return padded.view(torch.int64)
