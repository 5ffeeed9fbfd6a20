"""One line of a journal as a person reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_flashrecovery.runtime.journal import Line

_SHOWN = 8


def describe(line: Line) -> str:
    """Without its time."""
    teller = _TELLERS.get(line.name, _fields)
    return f"{line.name.lstrip('_')} {teller(line.body)}".rstrip()


def _fields(body: Mapping[str, Any]) -> str:
    shown = {
        key: value for key, value in body.items() if key not in ("time", "epoch") and value not in (None, [], {}, "")
    }
    return " ".join(f"{key}={_short(value)}" for key, value in shown.items())


def _losses(body: Mapping[str, Any]) -> str:
    return f"on {body['node']}: " + "; ".join(f"rank {loss['rank']}, {loss['cause']}" for loss in body["losses"])


def _reports(body: Mapping[str, Any]) -> str:
    told = [_report(report) for report in body["reports"][:_SHOWN]]
    more = len(body["reports"]) - len(told)
    return f"on {body['node']}: " + "; ".join(told) + (f"; and {more} more" if more > 0 else "")


def _report(report: Mapping[str, Any]) -> str:
    spot = report.get("spot")
    where = f" at {spot['operation']} of {spot['group']}" if spot else ""
    return f"rank {report['rank']} {report['standing']}{where}, step {report['step']}, {report['update']} the update"


def _drain(body: Mapping[str, Any]) -> str:
    parts = []
    if body["advance"]:
        parts.append(f"advance rank {_short(body['advance'])}")
    parts += [f"sever {group} ({reason})" for group, reason in list(body["sever"].items())[:_SHOWN]]
    if body["answer"]:
        parts.append(f"answer rank {_short(list(body['answer']))}")
    if body.get("match"):
        parts.append(f"let rank {_short(list(body['match']))} match others")
    return f"on {body['node']}: " + "; ".join(parts)


def _plan(body: Mapping[str, Any]) -> str:
    shares = [_share(share) for share in body["shares"] if share["source"] != "live"]
    told = "; ".join(shares[:_SHOWN]) or "everybody from live memory"
    return f"on {body['node']}: resume at step {body['resume_step']}, {told}"


def _numbers(body: Mapping[str, Any]) -> str:
    own = [f"rank {rank}, its own {kind}" for rank, kind in list(body["own"].items())[:_SHOWN]]
    found = [
        f"rank {rank}, {each['what']} of {each['where']}" for rank, each in list(body["findings"].items())[:_SHOWN]
    ]
    return f"on {body['node']}: {body['what']} in step {body['step']}; " + "; ".join([*own, *found])


def _diagnosed(body: Mapping[str, Any]) -> str:
    told = [f"{blamed['element']} is to blame (p {blamed['p']:.2g}): {blamed['evidence']}" for blamed in body["blamed"]]
    return f"of {body['occasion']}: " + "; ".join(told or [f"undetermined, {body['undetermined']}"])


def _groups(body: Mapping[str, Any]) -> str:
    reasons = [f"{group} ({reason})" for group, reason in list(body["rebuild"].items())[:_SHOWN]]
    more = len(body["rebuild"]) - len(reasons)
    return f"{body['kept']} kept; rebuilt: " + "; ".join(reasons) + (f"; and {more} more" if more > 0 else "")


def _share(share: Mapping[str, Any]) -> str:
    giver = f" of rank {share['giver']}" if share["giver"] is not None else ""
    return f"rank {share['rank']} from {share['source']}{giver}, {len(share['rebuild'])} groups rebuilt"


_TELLERS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "WorkersLost": _losses,
    "RanksStood": _reports,
    "Drain": _drain,
    "NumbersBad": _numbers,
    "ExecutePlan": _plan,
    "GroupsPlanned": _groups,
    "Diagnosed": _diagnosed,
}


def _short(value: object) -> str:
    if isinstance(value, list):
        shown = ", ".join(map(str, value[:_SHOWN]))
        return shown + (f" and {len(value) - _SHOWN} more" if len(value) > _SHOWN else "")
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, dict):
        return (
            f"{len(value)} entries" if len(value) > _SHOWN else ", ".join(f"{k}: {_short(v)}" for k, v in value.items())
        )
    return str(value)
