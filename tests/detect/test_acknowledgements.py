"""A peer that does not read is not a peer that is gone."""

import socket

import pytest

from megatron_flashrecovery.detect.acknowledgements import Acknowledgements, Delivery, delivery_of


@pytest.mark.parametrize(
    ("looks", "silence"),
    [
        pytest.param([(0.0, []), (9.0, [])], 0.0, id="no-connection"),
        pytest.param([(0.0, [Delivery(0, 30.0)]), (5.0, [Delivery(0, 35.0)])], 0.0, id="nothing-is-due"),
        pytest.param([(0.0, [Delivery(1, 0.1)]), (0.5, [Delivery(1, 0.6)]), (2.0, [Delivery(3, 2.1)])], 2.0, id="cut"),
        pytest.param([(0.0, [Delivery(1, 60.0)])], 0.0, id="idle-for-long-and-just-sent"),
        pytest.param([(0.0, [Delivery(1, 60.0)]), (1.0, [Delivery(2, 61.0)])], 1.0, id="idle-for-long-and-then-cut"),
        pytest.param([(0.0, [Delivery(1, 0.1)]), (9.0, [Delivery(1, 0.2)])], 0.2, id="in-flight-each-time"),
        pytest.param([(0.0, [Delivery(1, 0.1)]), (9.0, [Delivery(0, 8.9)])], 0.0, id="asleep-and-acknowledged-since"),
        pytest.param(
            [(0.0, [Delivery(1, 1.0), Delivery(0, 1.0)]), (9.0, [Delivery(2, 9.0), Delivery(0, 9.0)])],
            0.0,
            id="one-of-two-connections-has-nothing-due",
        ),
    ],
)
def test_only_what_was_sent_and_not_acknowledged_counts(looks, silence):
    acknowledgements = Acknowledgements(1)
    assert [acknowledgements.judge(found, now) for now, found in looks][-1] == pytest.approx(silence)


def test_a_process_that_does_not_read_is_acknowledged_by_its_kernel():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            acknowledgements = Acknowledgements(port)
            client.send(b"beat")
            assert acknowledgements.silence(0.0) == 0.0
            assert acknowledgements.silence(60.0) < 1.0
            assert delivery_of(client.dup()).unacknowledged == 0
            assert client.send(b"it is still open") > 0
