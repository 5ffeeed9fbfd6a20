"""`flashrecovery run` takes torchrun's flags, and refuses bad input in one line without touching anything."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from megatron_flashrecovery import cli
from megatron_flashrecovery.commands import run
from megatron_flashrecovery.commands.arguments import Arguments
from megatron_flashrecovery.runtime.log_dir import claim
from megatron_flashrecovery.runtime.moment import Moment

OURS = {
    "--spares-per-node",
    "--inject",
    "--allow-injection",
    "--overwrite",
    "--no-preload",
    *(f"--{name}" for name in run._DEADLINES),
}
# Which difference between ranks matters is the user's to say: nodes of two kinds are no fault.
OURS |= {"--slow-factor"}
# How many nodes wait, at the price of as many that could train, is the user's to say.
OURS |= {"--spare-nodes"}
# Switches and power domains are the site's, and a diagnosis takes time of node 0 that a site may want for itself.
OURS |= {"--topology", "--no-diagnosis"}


def parser():
    arguments = Arguments(prog="run")
    run.add_arguments(arguments)
    return arguments


def config(*argv, **environment):
    return run.launch_config(parser().parse_args(list(argv)), environment)


def test_the_flags_are_these_and_a_new_one_is_a_decision():
    assert set(parser().flags()) - OURS == {
        "--help",
        "--shutdown-timeout",
        "--nnodes",
        "--nproc-per-node",
        "--node-rank",
        "--master-addr",
        "--master-port",
        "--rdzv-backend",
        "--rdzv-endpoint",
        "--rdzv-id",
        "--standalone",
        "--max-restarts",
        "--monitor-interval",
        "--role",
        "--module",
        "--log-dir",
    }


def test_every_flag_of_torchrun_is_taken_or_refused_with_a_reason():
    torchrun = pytest.importorskip("torch.distributed.run").get_args_parser()
    theirs = {option.replace("_", "-") for action in torchrun._actions for option in action.option_strings}
    known = {*parser().flags(), *run.UNSUPPORTED}
    assert {flag for flag in theirs if flag.startswith("--")} - known == set()


def test_dashes_and_underscores_are_alike_and_the_scripts_flags_are_left_alone():
    found = config("--nproc_per_node=8", "--spares-per-node", "1", "train.py", "--lr", "1", "--nnodes", "7")
    assert (found.nproc_per_node, found.spares_per_node, found.nnodes) == (8, 1, 1)
    assert (found.script, found.script_args) == ("train.py", ("--lr", "1", "--nnodes", "7"))


def test_several_nodes_meet_at_the_endpoint_with_a_token_from_the_environment():
    argv = ["--nnodes", "2:2", "--node-rank", "1", "--rdzv-endpoint", "head:2950", "-m", "training"]
    found = config(*argv, FLASHRECOVERY_TOKEN="secret")
    assert (found.nnodes, found.node_rank, found.master_addr, found.master_port) == (2, 1, "head", 2950)
    assert (found.module, found.token) == (True, "secret")


def test_spare_nodes_are_started_by_the_same_command():
    argv = ["--nnodes", "2", "--spare-nodes", "1", "--node-rank", "2", "--rdzv-endpoint", "head:2950", "train.py"]
    found = config(*argv, FLASHRECOVERY_TOKEN="secret")
    assert (found.nnodes, found.spare_nodes, found.node_rank, found.is_spare) == (2, 1, 2, True)


def test_several_faults_may_be_injected():
    spec = "kill:rank=0,step=6,at=between"
    found = config("--nproc-per-node", "2", "--inject", spec, "--inject", spec, "train.py")
    assert [(i.rank, i.at) for i in found.injections] == [(0, Moment.BETWEEN)] * 2


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        pytest.param(["--nproc-pernode", "8", "{script}"], "did you mean --nproc-per-node?", id="unknown-flag"),
        pytest.param(["--tee", "3", "{script}"], "--tee is not supported", id="torchruns-only"),
        pytest.param([], "SCRIPT", id="no-script"),
        pytest.param(["nowhere.py"], "there is no script nowhere.py", id="script-missing"),
        pytest.param(["-m", "no.such.module"], "there is no module no.such.module", id="module-missing"),
        pytest.param(["--nnodes", "1:4", "{script}"], "--nnodes 1:4", id="elastic"),
        pytest.param(["--nnodes", "2", "{script}"], "--node-rank is missing", id="node-rank-missing"),
        pytest.param(["--spare-nodes", "1", "{script}"], "--spare-nodes 1: give --nnodes 2 or more", id="spares-alone"),
        pytest.param(["--spare-nodes", "one", "{script}"], "--spare-nodes", id="spare-nodes-no-number"),
        pytest.param(["--nproc-per-node", "many", "{script}"], "--nproc-per-node many", id="no-number"),
        pytest.param(["--inject", "kill:rank=5", "{script}"], "step is missing", id="spec"),
        pytest.param(["--drain-timeout", "soon", "{script}"], "--drain-timeout", id="no-seconds"),
        pytest.param(["--drain-timeout", "1", "{script}"], "is not longer than --heartbeat-timeout", id="deadlines"),
        pytest.param(["--rdzv-endpoint", "a:1", "--master-addr", "b", "{script}"], "give one of them", id="twice"),
        pytest.param(["--topology", "{script}", "{script}"], "train.py line 1 column 1 is no JSON", id="topology"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_and_leaves_nothing(argv, says, tmp_path, monkeypatch, capsys):
    script = tmp_path / "train.py"
    script.write_text("")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", *(word.format(script=script) for word in argv)], {}) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == [script]


@pytest.fixture
def log_dir(tmp_path):
    """With the records of an earlier run."""
    for name in ("journal.jsonl", "steps.jsonl", "summary.json", "notes.txt"):
        (tmp_path / name).write_text("precious")
    return tmp_path


def test_the_records_of_another_run_are_not_overwritten(log_dir, capsys):
    assert cli.main(["run", "--log-dir", str(log_dir), __file__], {}) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert {path.read_text() for path in log_dir.iterdir()} == {"precious"}


def test_overwrite_deletes_the_records_and_logs_and_nothing_else(log_dir):
    (log_dir / "logs").mkdir()
    (log_dir / "logs" / "rank0.log").write_text("of the earlier run")
    claim(log_dir, overwrite=True)
    assert sorted(path.name for path in log_dir.rglob("*")) == ["journal.jsonl", "logs", "notes.txt"]
    assert (log_dir / "journal.jsonl").read_text() == "", "claimed for this run"


def test_a_log_dir_that_cannot_be_made_is_named(tmp_path, capsys):
    name = "long" * 100
    assert cli.main(["run", "--log-dir", str(tmp_path / name), __file__], {}) == 2
    assert f"{name} cannot be written: File name too long" in capsys.readouterr().err


def test_help_tells_every_default():
    config = run.launch_config(parser().parse_args(["train.py"]), {})
    shown = {action.dest: action.help for action in parser()._actions if action.metavar and action.dest != "script"}
    default_of = {field.name: getattr(config.deadlines, field.name) for field in fields(config.deadlines)}
    assert default_of.keys() <= shown.keys()
    for name in (
        "nnodes",
        "spare_nodes",
        "nproc_per_node",
        "max_restarts",
        "spares_per_node",
        "shutdown_timeout",
        "slow_factor",
    ):
        default_of[name] = getattr(config, name)
    for name, default in default_of.items():
        assert f"({default:g}" in shown[name], name


def test_only_a_run_imports_torch():
    code = "import sys; from megatron_flashrecovery import cli; cli.main(['plan', '--world-size', '0']); "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_a_topology_is_parsed_without_what_a_diagnosis_imports():
    imports = "import sys, megatron_flashrecovery.diagnose.description; print(*sys.modules, sep='\\n')"
    modules = subprocess.run([sys.executable, "-c", imports], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "torch", "scipy", "matplotlib"} & set(modules)


def test_hooks_wait_for_the_framework_only_if_the_script_is_given_the_flag():
    assert config("train.py", "--lr", "1").hooks == ()
    assert config("train.py", "--enable-flash-recovery").hooks == run.HOOKS


def test_the_command_leaves_without_tearing_its_interpreter_down(tmp_path):
    script = tmp_path / "command.py"
    script.write_text(
        "import sys\n"
        "from megatron_flashrecovery.cli import main\n"
        "class Costly:\n"
        "    def __del__(self):\n"
        "        print('torn down')\n"
        "costly = Costly()\n"
        "sys.argv = ['flashrecovery', *sys.argv[1:]]\n"
        "sys.exit(main())\n"
    )
    for argv, code, says in [(["policy", "hang"], 0, "hang"), (["status", str(tmp_path)], 2, "does not exist")]:
        done = subprocess.run([sys.executable, str(script), *argv], capture_output=True, text=True, check=False)
        assert done.returncode == code
        assert says in done.stdout + done.stderr
        assert "torn down" not in done.stdout
