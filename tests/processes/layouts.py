"""How many ranks a job has, and who of them does what: on CPU always the same, on GPUs as many as there are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Degrees of tensor, pipeline and data parallelism."""

    tensor: int
    pipeline: int
    data: int

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def name(self) -> str:
        degrees = {"TP": self.tensor, "PP": self.pipeline, "DP": self.data}
        return "x".join(f"{kind}{degree}" for kind, degree in degrees.items() if degree > 1)

    @property
    def arguments(self) -> tuple[str, ...]:
        """By Megatron's names. What is left of the ranks is data parallel."""
        return (
            *("--tensor-model-parallel-size", str(self.tensor)),
            *("--pipeline-model-parallel-size", str(self.pipeline)),
        )

    def rank(self, of_main: int) -> int:
        """Who stands here for a rank of the main job."""
        return of_main % self.ranks


MAIN = Layout(2, 2, 2)
_OF_DEVICES = {8: (MAIN,), 4: (Layout(2, 1, 2), Layout(1, 2, 2)), 2: (Layout(1, 1, 2),)}


def layouts_for(devices: int) -> tuple[Layout, ...]:
    """What to run on a machine with so many GPUs, the most telling first; NCCL puts no two ranks on one."""
    fitting = [ranks for ranks in _OF_DEVICES if ranks <= devices]
    return _OF_DEVICES[max(fitting)] if fitting else ()


def order_of_losses(layout: Layout) -> tuple[int, ...]:
    """Every rank once, data-parallel peers one right after the other: the host of a lost rank is the next to be hit.

    Megatron counts ranks by tensor, then data, then pipeline parallelism.
    """
    width = layout.tensor * layout.data
    peers = [
        tuple(stage * width + tensor + layout.tensor * data for data in range(layout.data))
        for stage in range(layout.pipeline)
        for tensor in range(layout.tensor)
    ]
    order: list[int] = []
    while peers:
        order += peers.pop()
        peers.reverse()  # from both ends: neighbours in the model are not hit in a row
    return tuple(order)
