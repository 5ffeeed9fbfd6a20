"""What an agent makes of what its workers say at about the same time."""

from megatron_flashrecovery.core.findings import Finding, NumbersBad, NumbersSound
from megatron_flashrecovery.core.ids import Epoch, NodeId, Rank, Step
from megatron_flashrecovery.core.policy import NanChoice
from megatron_flashrecovery.runtime import dialogue
from megatron_flashrecovery.runtime.relay import merged, of_numbers

NODE = NodeId("a")
FOUND = Finding(3, "a module", "output")


def refused(rank, what="the norm is nan", own="", finding=None, epoch=0):
    said = dialogue.UpdateRefused(Epoch(epoch), Step(4), what, own, finding, NanChoice.SKIP)
    return of_numbers(NODE, Rank(rank), said)


def test_what_ranks_say_of_bad_numbers_becomes_one_event_that_names_exceptions_only():
    told = [refused(0), refused(2, "the loss is inf", "loss", FOUND), refused(1)]
    assert merged(told) == [
        NumbersBad(NODE, 0, 4, (0, 2, 1), "the loss is inf", {2: "loss"}, {2: FOUND}, NanChoice.SKIP)
    ]


def test_what_belongs_to_two_epochs_stays_apart():
    told = [refused(0), refused(1, epoch=1), of_numbers(NODE, Rank(0), dialogue.Examined(Epoch(1), Step(4)))]
    assert merged(told) == told
    assert told[-1] == NumbersSound(NODE, 1, 4)
