"""What the kernel counts of a machine's links."""

from __future__ import annotations

import pytest

from megatron_flashrecovery.detect.counters import NetworkCounters, PortCounters

SNMP = """Ip: Forwarding DefaultTTL
Ip: 1 64
Tcp: RtoAlgorithm MaxConn InSegs OutSegs RetransSegs InErrs
Tcp: 1 -1 100 2000 7 0
"""


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def machine(tmp_path):
    """One real interface, and two that are not."""
    write(tmp_path / "proc/net/snmp", SNMP)
    for name in ("eth0", "veth1", "lo"):
        for counter in ("rx_errors", "tx_errors"):
            write(tmp_path / f"sys/class/net/{name}/statistics/{counter}", "5\n")
    write(tmp_path / "sys/class/net/eth0/carrier_changes", "2\n")
    (tmp_path / "sys/class/net/eth0/device").mkdir()
    return tmp_path


@pytest.fixture
def counters(machine):
    counters = NetworkCounters(machine / "proc", machine / "sys")
    yield counters
    counters.close()


def test_tcp_and_real_interfaces_are_read_and_what_a_kernel_does_not_have_is_left_out(counters):
    assert counters.read() == {
        "tcp.sent": 2000,
        "tcp.retransmitted": 7,
        "nic.eth0.rx_errors": 5,
        "nic.eth0.tx_errors": 5,
        "nic.eth0.carrier_changes": 2,
    }


def test_they_are_read_anew_each_time(machine, counters):
    write(machine / "proc/net/snmp", SNMP.replace("2000 7", "2100 9"))
    write(machine / "sys/class/net/eth0/statistics/rx_errors", "6\n")
    found = counters.read()
    assert (found["tcp.sent"], found["tcp.retransmitted"], found["nic.eth0.rx_errors"]) == (2100, 9, 6)


def test_in_a_container_without_real_interfaces_all_but_the_local_one_count(machine):
    (machine / "sys/class/net/eth0/device").rmdir()
    counters = NetworkCounters(machine / "proc", machine / "sys")
    assert {name.split(".")[1] for name in counters.read() if name.startswith("nic")} == {"eth0", "veth1"}
    counters.close()


def test_the_kernel_of_this_machine_has_them():
    counters = NetworkCounters()
    first, second = counters.read(), counters.read()
    assert 0 < first["tcp.sent"] <= second["tcp.sent"]
    counters.close()


def test_ports_of_infiniband_are_read_and_there_may_be_none(tmp_path):
    assert PortCounters(tmp_path).read() == {}
    write(tmp_path / "mlx5_0/ports/1/counters/symbol_error", "3\n")
    write(tmp_path / "mlx5_0/ports/1/hw_counters/out_of_sequence", "4\n")
    write(tmp_path / "mlx5_0/ports/1/counters/link_downed", "not known\n")
    assert PortCounters(tmp_path).read() == {"ib.mlx5_0/1.symbol_error": 3, "ib.mlx5_0/1.out_of_sequence": 4}


def test_what_a_sandbox_shows_of_tcp_is_no_reason_to_fail(machine, counters):
    for text in ("", "Tcp: OutSegs\nTcp: 3\n", "Tcp: OutSegs RetransSegs\nTcp: 3\n"):
        write(machine / "proc/net/snmp", text)
        assert counters.read().keys() == {"nic.eth0.rx_errors", "nic.eth0.tx_errors", "nic.eth0.carrier_changes"}
