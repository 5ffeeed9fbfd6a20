"""Typed messages as msgpack: the name of a dataclass and its fields, checked against its annotations on arrival.

Nothing is ever unpickled. A message of an unknown name or with a field of the wrong type is refused as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec


class UnknownMessage(ValueError):
    """The peer sent something that this version does not know: two nodes run different versions."""


class Codec:
    """Encodes and decodes the given dataclasses, and no others."""

    def __init__(self, classes: Iterable[type]) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._envelope = msgspec.msgpack.Decoder(tuple[str, msgspec.Raw])
        self._decoders: dict[str, msgspec.msgpack.Decoder[Any]] = {
            cls.__name__: msgspec.msgpack.Decoder(cls) for cls in classes
        }

    def encode(self, message: object) -> bytes:
        name = type(message).__name__
        if name not in self._decoders:
            raise UnknownMessage(f"{name} is not a message of this channel")
        return self._encoder.encode((name, message))

    def decode(self, data: bytes | memoryview) -> object:
        """Raises ``UnknownMessage``: the bytes are no message of this channel."""
        try:
            name, body = self._envelope.decode(data)
            return self._decoders[name].decode(body)
        except KeyError:
            raise UnknownMessage(f"no message is called {name!r}: do all nodes run the same version?") from None
        except msgspec.DecodeError as error:
            raise UnknownMessage(f"malformed message: {error}") from None
