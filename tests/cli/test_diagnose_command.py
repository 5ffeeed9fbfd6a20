"""`flashrecovery diagnose` names who is to blame, or says that it cannot be told."""

from __future__ import annotations

import builtins
import json
import struct
import subprocess
import sys

import pytest

from megatron_flashrecovery.cli import main
from megatron_flashrecovery.core.policy import Fault
from tests.diagnose.recorded import Records

HOSTS, DEVICES = 32, 4
LEAVES = [f"spine0.leaf{host // 8}.gpu{host:02d}" for host in range(HOSTS)]


@pytest.fixture
def records(tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    return Records(directory, HOSTS, DEVICES, tensor=4, switches=LEAVES)


def diagnose(records, capsys, *flags):
    code = main(["diagnose", str(records.directory), *map(str, flags)], {})
    return code, " ".join(capsys.readouterr().out.split())


def slowed(records, *ranks):
    slower = dict.fromkeys(ranks, 2.0)
    return records.train(20).train(6, slower).name_slow(*ranks).train(14, slower)


def test_a_slow_device_is_to_blame(records, capsys):
    code, said = diagnose(slowed(records, 22), capsys)
    assert code == 0
    assert "128 ranks on 32 hosts; switches by what SLURM told the nodes" in said
    assert "to blame: device gpu05/2 (p " in said
    assert "hosts to leave out: gpu05" in said


def test_a_slow_host_is_to_blame_and_programs_are_told_where_it_is(records, capsys):
    code, said = diagnose(slowed(records, 20, 21, 22, 23), capsys, "--json")
    report = json.loads(said)
    (blamed,) = report["blamed"]
    assert (code, report["undetermined"]) == (0, None)
    assert (blamed["element"], blamed["hosts"], blamed["nodes"]) == ("host gpu05", ["gpu05"], ["node5"])
    assert blamed["ranks"] == [20, 21, 22, 23]
    assert blamed["p"] <= 0.01


def test_a_healthy_run_is_undetermined_and_says_why(records, capsys):
    code, said = diagnose(records.train(60), capsys)
    assert code == 1
    assert "undetermined: own time of a step: nothing" in said
    assert "to blame" not in said


def test_losses_that_come_under_one_switch_again_and_again_blame_it(records, capsys):
    code, said = diagnose(records.train(5).lose(32, 41, 48, 63, 37, 58, 45, 50), capsys)
    assert code == 0
    assert "to blame: leaf switch leaf1 (p 0.0" in said
    assert "incidents: 8 of 8 incidents, and it has 25.0% of the ranks" in said
    assert "hosts to leave out: gpu[08-12,14-15]" in said


def test_losses_anywhere_and_bugs_of_the_script_blame_nobody(records, capsys):
    records.train(5).lose(1, 17, 38, 60).lose(3, 3, 3, 3, fault=Fault.EXCEPTION)
    code, said = diagnose(records, capsys)
    assert code == 1
    assert "incidents: 4 incidents, at most" in said


def test_a_site_may_add_what_it_has_counted(records, capsys, tmp_path):
    site = tmp_path / "site.csv"
    rows = [
        f"{records.now + 5},port errors,errors,gpu{host:02d},{400 if host == 9 else host % 3},60"
        for host in range(HOSTS)
    ]
    site.write_text("\n".join(["time,metric,like,host,value,seconds", *rows]))
    code, said = diagnose(records.train(10), capsys, "--telemetry", site)
    assert code == 0, said
    assert "to blame: host gpu09" in said
    assert "port errors: host gpu09 has 33.3 errors" in said


def test_a_scheduler_gets_the_hosts_alone(records, capsys):
    slowed(records, 20, 21, 22, 23)
    assert main(["diagnose", str(records.directory), "--cordon", "hosts"], {}) == 0
    assert capsys.readouterr().out == "gpu05\n"
    assert main(["diagnose", str(records.directory), "--cordon", "slurm"], {}) == 0
    assert capsys.readouterr().out == (
        'scontrol update NodeName=gpu05 State=DRAIN Reason="flashrecovery: host gpu05, by own time of a step"\n'
    )


def test_the_picture_is_written_as_its_name_says(records, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    slowed(records, 22)
    diagnose(records, capsys, "--picture", tmp_path / "it.png")
    diagnose(records, capsys, "--picture", tmp_path / "it.svg")
    head = (tmp_path / "it.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", head[16:24])) > 600
    assert (tmp_path / "it.svg").read_text().lstrip().startswith("<?xml")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        pytest.param(["--picture", "it.pdf"], "name a file that ends with .svg or .png", id="suffix"),
        pytest.param(["--picture", "nowhere/it.svg"], "there is no directory nowhere", id="directory"),
        pytest.param(["--telemetry", "nowhere.csv"], "--telemetry nowhere.csv cannot be read", id="telemetry"),
        pytest.param(["--topology", "nowhere.json"], "--topology nowhere.json", id="topology"),
        pytest.param(["--last", "0"], "--last 0: give seconds above zero", id="last"),
        pytest.param(["--level", "2"], "--level 2: give a share above 0", id="level"),
        pytest.param(["--deadline", "-1"], "--deadline -1: give seconds", id="deadline"),
    ],
)
def test_bad_input_is_one_line_with_the_remedy(records, capsys, flags, says):
    assert main(["diagnose", str(records.directory), *flags], {}) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_no_records_are_one_line(tmp_path, capsys):
    assert main(["diagnose", str(tmp_path)], {}) == 2
    assert "name the --log-dir of a run" in capsys.readouterr().err


def test_without_matplotlib_a_picture_is_refused_with_the_remedy(records, capsys, monkeypatch):
    real = builtins.__import__

    def refuse(name, *arguments, **named):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert main(["diagnose", str(records.directory), "--picture", "it.svg"], {}) == 2
    assert "pip install 'megatron-flashrecovery[diagnose]'" in capsys.readouterr().err


def test_the_controller_imports_nothing_of_a_diagnosis():
    """The launcher lives as long as the job. Nor torch, for the fork server is to begin with its imports at once."""
    imports = "import sys, megatron_flashrecovery.runtime.launch; print(*sys.modules, sep='\\n')"
    modules = subprocess.run([sys.executable, "-c", imports], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "scipy", "matplotlib", "pcst_fast", "megatron_flashrecovery.diagnose.scan"} & set(
        modules
    )
