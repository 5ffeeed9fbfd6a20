"""The names of things: a rank is a seat, a worker is the process that sits on it.

Seats never fail, workers do. A step is a completed optimizer update; "the state of step s" is the state after it. An
epoch is one staffing of the job: every loss opens a new one, and whatever belongs to an older one is ignored.
"""

from __future__ import annotations

from typing import NewType

Rank = NewType("Rank", int)
WorkerId = NewType("WorkerId", str)
NodeId = NewType("NodeId", str)
Epoch = NewType("Epoch", int)
Step = NewType("Step", int)
GroupKey = NewType("GroupKey", str)
OrderNumber = NewType("OrderNumber", int)
