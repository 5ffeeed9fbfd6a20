"""The example: plain megatron-core, without anything of this package but the stand-in."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.frameworks.launching import EXAMPLE, environment, torchrun

sys.path.insert(0, str(EXAMPLE.parent))

import device_setup
import gpt_data
from gpt_arguments import parse_arguments
from megatron.core.datasets.indexed_dataset import IndexedDataset

pytestmark = pytest.mark.timeout(300)


@pytest.mark.slow
def test_two_runs_are_equal_bit_for_bit(tmp_path):
    for run in ("a", "b"):
        torchrun(8, EXAMPLE, ["--train-iters", "3", "--dump-dir", str(tmp_path / run)])
    first, second = results(tmp_path / "a"), results(tmp_path / "b")
    assert first == second
    assert len(first["steps"]) == 3
    assert set(first["summary"]["state_sha256"]) == {str(rank) for rank in range(8)}


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param([], id="distributed"),
        pytest.param(
            ["--bf16", "--overlap-grad-reduce", "--overlap-param-gather"],
            id="distributed-bf16-overlapped",
            marks=pytest.mark.slow,
        ),
        pytest.param(["--no-use-distributed-optimizer"], id="plain", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_goes_on_from_a_checkpoint_is_equal_bit_for_bit(tmp_path, flags):
    layout = ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1", "--train-iters", "4"]
    layout += ["--eval-iters", "1", "--eval-interval", "2"]
    saving = ["--save", str(tmp_path / "saved"), "--save-interval", "2", "--dump-dir", str(tmp_path / "a")]
    whole = torchrun(2, EXAMPLE, [*layout, *flags, *saving])
    marker = tmp_path / "saved" / "latest_checkpointed_iteration.txt"
    assert marker.read_text() == "4"
    marker.write_text("2")
    rest = torchrun(2, EXAMPLE, [*layout, *flags, "--load", str(tmp_path / "saved"), "--dump-dir", str(tmp_path / "b")])
    first, second = results(tmp_path / "a"), results(tmp_path / "b")
    assert first["steps"][2:] == second["steps"]
    assert first["summary"] == second["summary"]
    assert validations(whole) == validations(rest)


def test_importing_the_script_starts_no_thread_and_no_device(tmp_path):
    code = (
        f"import sys, os; sys.path.insert(0, {str(EXAMPLE.parent)!r}); import pretrain_gpt, torch;"
        "assert len(os.listdir('/proc/self/task')) == 1, os.listdir('/proc/self/task');"
        "assert not torch.cuda.is_initialized(); assert 'grpc' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True, timeout=240)


@pytest.mark.parametrize(
    ("world_size", "argv", "named"),
    [
        pytest.param(6, [], "6 ranks do not divide", id="layout"),
        pytest.param(8, ["--global-batch-size", "6"], "--global-batch-size 6", id="batch"),
        pytest.param(8, ["--num-layers", "3"], "--num-layers 3", id="layers"),
        pytest.param(8, ["--seq-length", "64"], "--seq-length 64", id="positions"),
        pytest.param(8, ["--overlap-param-gather"], "--overlap-grad-reduce", id="overlap"),
        pytest.param(8, ["--save-interval", "2"], "--save DIR", id="save"),
        pytest.param(8, ["--no-such-flag"], "--no-such-flag", id="unknown"),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_line(monkeypatch, capsys, world_size, argv, named):
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(argv)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line


@pytest.mark.parametrize(("devices", "refused"), [(0, False), (4, True), (8, False)])
def test_two_ranks_on_one_gpu_are_refused_before_nccl_does_it(monkeypatch, capsys, devices, refused):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(device_setup, "DEVICES", devices)
    if not refused:
        assert parse_arguments([]).devices_here == devices
        return
    with pytest.raises(SystemExit):
        parse_arguments([])
    assert "8 ranks and 4 GPUs on this node" in capsys.readouterr().err


def test_processes_that_build_the_text_at_once_all_get_the_same(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(EXAMPLE.parent)!r})\n"
        "from pathlib import Path; import device_setup, gpt_data\n"
        f"print(gpt_data.library_text(Path({str(tmp_path)!r})))"
    )
    builders = [
        subprocess.Popen([sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    prefixes = {builder.communicate(timeout=240)[0] for builder in builders}
    assert len(prefixes) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == [Path(prefixes.pop().strip()).parent.name]


def test_a_build_that_died_half_way_is_not_taken_for_the_text(tmp_path):
    half_built = tmp_path / ".building-dead"
    half_built.mkdir()
    (half_built / "text.bin").write_bytes(b"half")
    prefix = gpt_data.library_text(tmp_path)
    text = IndexedDataset(str(prefix))
    source = next(iter(sorted(Path(os.__file__).parent.glob("*.py")))).read_bytes()
    assert text[0].astype("uint8").tobytes() == source + b"\0"


def results(directory: Path) -> dict:
    steps = [json.loads(line) for line in (directory / "steps.jsonl").read_text().splitlines()]
    return {
        "steps": [{name: value for name, value in step.items() if name != "seconds"} for step in steps],
        "summary": json.loads((directory / "summary.json").read_text()),
    }


def validations(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("validation after step 4")]
