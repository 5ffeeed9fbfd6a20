"""Prints an outlook: short for jobs of any size."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

from rich.table import Table

from megatron_flashrecovery.commands.console import Console
from megatron_flashrecovery.core.bill import Bill, NodeBill, readable
from megatron_flashrecovery.core.ids import NodeId, Rank
from megatron_flashrecovery.core.mirroring import Placement
from megatron_flashrecovery.core.outlook import Arrangement, Outlook
from megatron_flashrecovery.core.survival import FatalPairs

_ROWS = 32


def show(job: Arrangement, found: Outlook) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{len(job.node_of)} ranks; nodes: {len(set(job.node_of.values()))}; {_kind(job)}")
    console.print(_placement_table(job, found.placement))
    console.print(_bill_table(found.bill))
    console.print("device memory: one staging buffer at most")
    for line in _losses(job, found):
        console.print(line)
    for warning in found.warnings:
        console.print(f"[bold yellow]warning[/]: {warning}")


def _kind(job: Arrangement) -> str:
    if all(len(group) == 1 for group in job.peers.values()):
        return "no rank has a data-parallel peer: every rank's whole state is mirrored"
    if job.sharded:
        return "the optimizer state is split: every rank's share is mirrored"
    return "the big state has its copies on data-parallel peers: only small pieces are mirrored"


def _placement_table(job: Arrangement, placement: Placement) -> Table:
    if len(placement.host_of) <= _ROWS:
        table = Table("rank", "node", "second copy at rank", "node", "a peer", title="second copies")
        for guest, host in sorted(placement.host_of.items()):
            peer = "yes" if host in job.peers[guest] else "no"
            table.add_row(str(guest), job.node_of[guest], str(host), job.node_of[host], peer)
        return table
    table = Table("ranks", "second copy at", "on another node", "at a peer", title="second copies")
    for distance, guests in _by_distance(placement).items():
        elsewhere = sum(job.node_of[guest] != job.node_of[placement.host_of[guest]] for guest in guests)
        beside = sum(placement.host_of[guest] in job.peers[guest] for guest in guests)
        label = f"rank {distance:+d}" if distance is not None else "other ranks"
        table.add_row(f"{len(guests)}: {_some(guests)}", label, str(elsewhere), str(beside))
    return table


def _by_distance(placement: Placement) -> dict[int | None, list[Rank]]:
    """Regular layouts have few distances; what does not fit into the table is put together."""
    common = {
        distance
        for distance, _ in Counter(host - guest for guest, host in placement.host_of.items()).most_common(_ROWS - 1)
    }
    found: dict[int | None, list[Rank]] = defaultdict(list)
    for guest, host in sorted(placement.host_of.items()):
        distance = host - guest
        found[distance if distance in common else None].append(guest)
    return found


def _some(ranks: list[Rank]) -> str:
    shown = ", ".join(map(str, ranks[:3]))
    return f"{shown}, ..., {ranks[-1]}" if len(ranks) > 4 else ", ".join(map(str, ranks))


def _bill_table(bill: Bill) -> Table:
    table = Table(
        "nodes", "memory: own copies", "memory: guests", "sent per step", "received per step", title="what they cost"
    )
    alike: Mapping[NodeBill, list[NodeId]] = defaultdict(list)
    for node in bill.nodes:
        anonymous = NodeBill(NodeId(""), node.ranks, node.own, node.guests, node.sent, node.received)
        alike[anonymous].append(node.node)
    for node, names in sorted(alike.items(), key=lambda item: item[1][0])[:_ROWS]:
        label = names[0] if len(names) == 1 else f"each of {len(names)}, like {names[0]}"
        table.add_row(label, *map(readable, (node.own, node.guests, node.sent, node.received)))
    table.caption = (
        f"each rank hands {readable(bill.mirrored)} to its host per step; two steps are kept of own and guests' state; "
        f"{readable(bill.memory)} of host memory in all"
    )
    return table


def _losses(job: Arrangement, found: Outlook) -> list[str]:
    survival = found.survival
    nodes = len(set(job.node_of.values()))
    fatal = len(survival.fatal_nodes)
    lines = ["losses survived without a checkpoint:", "  any one rank: yes"]
    verdict = "yes" if not fatal else f"no, {fatal} of {nodes} are not survived: {', '.join(survival.fatal_nodes[:3])}"
    lines.append(f"  any one node: {verdict}")
    lines.append(f"  any two ranks in one step: {_pairs(survival.rank_pairs)}")
    if survival.node_pairs.total:
        lines.append(f"  any two nodes in one step: {_pairs(survival.node_pairs)}")
    return lines


def _pairs(pairs: FatalPairs) -> str:
    if not pairs.count:
        return "yes"
    examples = "; ".join(f"{one} with {other}" for one, other in pairs.examples)
    return f"{pairs.total - pairs.count} of {pairs.total} pairs; not {examples}{'; ...' if pairs.count > 3 else ''}"
