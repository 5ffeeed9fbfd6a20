"""A rank's own snapshots: taken by the main thread at a step boundary, sealed by the mirror thread in the shadow of the
next step, verified before anything is restored from them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_flashrecovery.core.errors import SnapshotMismatch
from megatron_flashrecovery.core.ids import Epoch, Rank, Step
from megatron_flashrecovery.core.snapshot import Offer, SnapshotId
from megatron_flashrecovery.state.content import body_at, content_nbytes, read_content, write_frame
from megatron_flashrecovery.state.copying import Copier, HostCopier
from megatron_flashrecovery.state.encoding import decode_values, encode_values
from megatron_flashrecovery.state.fingerprint import fingerprint
from megatron_flashrecovery.state.intake import Intake
from megatron_flashrecovery.state.manifest import Manifest, difference, manifest_of, views_into
from megatron_flashrecovery.state.pieces import TensorPiece, Value
from megatron_flashrecovery.state.slot import Slot, SlotHeader
from megatron_flashrecovery.state.slot_pair import SlotPair


@dataclass(frozen=True)
class _Captured:
    id: SnapshotId
    slot: Slot
    nbytes: int
    wait: Callable[[], None]


class Snapshots:
    """The two slots of one owner. ``capture`` and ``restore`` are the main thread's, the others anybody's."""

    def __init__(self, rank: Rank, slots: Sequence[Slot], copier: Copier | None = None) -> None:
        self._pair = SlotPair(rank, slots)
        self._copier = copier or HostCopier()
        self._flat = {slot: torch.frombuffer(slot.content(), dtype=torch.uint8) for slot in slots}
        for memory in self._flat.values():
            self._copier.prepare(memory)
        # Made once per slot, for the manifest does not change in a run.
        self._views: dict[Slot, tuple[Manifest, Sequence[torch.Tensor]]] = {}
        self._captured: dict[Step, _Captured] = {}
        self._lock = threading.Lock()

    def capture(
        self, step: Step, epoch: Epoch, tensors: Sequence[TensorPiece], values: Mapping[str, Value]
    ) -> SnapshotId:
        """Copy the state of ``step`` into the slot that matters least. No source of anything until it is sealed.

        On a device the copies may still run when this returns; ``seal`` waits for them. Raises ``ConfigError`` if the
        values have outgrown the slot, ``UnencodableValue`` if they cannot be written down.
        """
        encoded = encode_values(values)
        manifest = manifest_of(tensors)
        packed = manifest.encode()
        nbytes = content_nbytes(manifest, packed, encoded, self._pair.capacity)
        id = SnapshotId(self._pair.rank, step, epoch)
        slot = self._pair.begin(id)
        views = self._views_of(slot, manifest, len(packed))
        write_frame(slot.content(nbytes), manifest, packed, encoded)
        wait = self._copier.copy_out([(view, p.tensor) for view, p in zip(views, tensors, strict=True)])
        with self._lock:
            self._captured[step] = _Captured(id, slot, nbytes, wait)
        return id

    def seal(self, step: Step) -> Offer:
        """Fingerprint the captured snapshot and commit it. Returns what to announce to the host; see ``content``.

        Raises ``SnapshotMismatch`` if it was discarded meanwhile, or never captured.
        """
        with self._lock:
            captured = self._captured.pop(step, None)
        if captured is None:
            raise SnapshotMismatch(f"rank {self._pair.rank} has captured no snapshot of step {step}, or discarded it")
        captured.wait()
        header = SlotHeader(captured.id, captured.nbytes, fingerprint(captured.slot.content(captured.nbytes)))
        self._pair.commit(captured.slot, header)
        return Offer(header.id, header.nbytes, header.fingerprint)

    def content(self, step: Step) -> tuple[Offer, memoryview]:
        """A sealed snapshot and its bytes, to be sent. Raises ``SnapshotMismatch``: there is none of this step."""
        found = self._pair.find(step)
        if found is None:
            raise SnapshotMismatch(f"rank {self._pair.rank} has no sealed snapshot of step {step}")
        header, content = found
        return Offer(header.id, header.nbytes, header.fingerprint), content

    def restore(self, step: Step, tensors: Sequence[TensorPiece]) -> dict[str, Value]:
        """Write the snapshot of ``step`` into ``tensors``, and return its values.

        Raises ``SnapshotMismatch`` before anything is written: there is none, its bytes are not those that were sealed,
        or its pieces are not these.
        """
        header, content = self._pair.verified(step)
        parts = read_content(content)
        if (reason := difference(parts.manifest, manifest_of(tensors))) is not None:
            raise SnapshotMismatch(f"snapshot of rank {header.id.rank}, step {step} does not fit: {reason}")
        if parts.body:
            views = views_into(torch.frombuffer(parts.body, dtype=torch.uint8), parts.manifest)
            self._copier.copy_in([(p.tensor, view) for p, view in zip(tensors, views, strict=True)])
        return decode_values(parts.values)

    def steps(self) -> tuple[Step, ...]:
        """Of the sealed snapshots, ascending."""
        return self._pair.steps()

    def discard_newer_than(self, step: Step) -> None:
        """Sealed, captured or half received: a snapshot of a later step does not exist any more."""
        with self._lock:
            self._captured = {held: captured for held, captured in self._captured.items() if held <= step}
        self._pair.discard_newer_than(step)

    def intake(self) -> Intake:
        """Where a replacement receives the mirror of its own rank, to ``restore`` it afterwards."""
        return Intake(self._pair)

    def close(self) -> None:
        """Give the memory up; what is sealed stays in it."""
        self._copier.close()
        self._captured.clear()
        self._views.clear()
        self._flat.clear()

    def _views_of(self, slot: Slot, manifest: Manifest, packed_nbytes: int) -> Sequence[torch.Tensor]:
        made = self._views.get(slot)
        if made is None or made[0] != manifest:
            start = body_at(packed_nbytes)
            body = self._flat[slot][start : start + manifest.body_nbytes]
            made = self._views[slot] = (manifest, views_into(body, manifest))
        return made[1]
