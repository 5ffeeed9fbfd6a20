"""Which layouts are run on which machine, and what is asked of Megatron-LM there: decided without any GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.frameworks.megatron_lm_features import FEATURES, ON_GPUS_ONLY, Machine, kills_with, why_not
from tests.frameworks.megatron_lm_job import CHECKOUT, gpu_flags, pretrain
from tests.processes.launcher import ROOT
from tests.processes.layouts import MAIN, Layout, layouts_for, order_of_losses
from tests.processes.matrix import everybody, on_gpus

TE = frozenset({"transformer_engine"})
H100, A100 = (9, 0), (8, 0)


@pytest.mark.parametrize(
    ("devices", "names"),
    [
        pytest.param(0, [], id="none"),
        pytest.param(1, [], id="one"),
        pytest.param(2, ["DP2"], id="two"),
        pytest.param(3, ["DP2"], id="three"),
        pytest.param(4, ["TP2xDP2", "PP2xDP2"], id="four"),
        pytest.param(7, ["TP2xDP2", "PP2xDP2"], id="seven"),
        pytest.param(8, ["TP2xPP2xDP2"], id="eight"),
        pytest.param(16, ["TP2xPP2xDP2"], id="sixteen"),
    ],
)
def test_the_layouts_are_those_that_fit_the_devices(devices, names):
    assert [layout.name for layout in layouts_for(devices)] == names
    assert all(layout.ranks <= devices and layout.data == 2 for layout in layouts_for(devices))


@pytest.mark.parametrize(
    ("layout", "order"),
    [
        pytest.param(MAIN, (5, 7, 0, 2, 4, 6, 1, 3), id="eight"),
        pytest.param(Layout(2, 1, 2), (1, 3, 0, 2), id="tensor"),
        pytest.param(Layout(1, 2, 2), (2, 3, 0, 1), id="pipeline"),
        pytest.param(Layout(1, 1, 2), (0, 1), id="data"),
    ],
)
def test_every_rank_is_lost_once_and_its_peer_right_after_it(layout, order):
    assert order_of_losses(layout) == order
    assert sorted(order) == list(range(layout.ranks))


@pytest.mark.parametrize("layout", [layout for devices in (2, 4, 8) for layout in layouts_for(devices)], ids=str)
def test_the_job_of_a_layout_starts_its_ranks_and_kills_each(layout, tmp_path):
    job = on_gpus(everybody("overlap", "backward", layout))
    command = job.command(tmp_path)
    assert command[command.index("--nproc-per-node") + 1] == str(layout.ranks)
    assert command[command.index("--tensor-model-parallel-size") + 1] == str(layout.tensor)
    assert command[command.index("--pipeline-model-parallel-size") + 1] == str(layout.pipeline)
    assert command.count("--inject") == layout.ranks
    assert job.environment["NCCL_ALGO"] == "Ring"


@pytest.mark.parametrize(
    ("feature", "machine", "reason"),
    [
        pytest.param("distributed", Machine(Layout(1, 1, 2), (), A100), "", id="two"),
        pytest.param("tp-only", Machine(Layout(1, 1, 2), (), A100), "multiple of 4", id="too-few"),
        pytest.param("tp-only", Machine(Layout(2, 1, 2), (), A100), "", id="four"),
        pytest.param("interleaved", Machine(Layout(2, 1, 2), (), A100), "", id="degrees-of-the-feature-count"),
        pytest.param("context", Machine(MAIN, (), H100), "Transformer Engine", id="no-library"),
        pytest.param("context", Machine(MAIN, TE, H100), "", id="library"),
        pytest.param("fp8", Machine(MAIN, TE, A100), "no FP8", id="old-device"),
        pytest.param("fp8", Machine(MAIN, TE, H100), "", id="new-device"),
    ],
)
def test_a_feature_is_run_where_its_degrees_libraries_and_devices_are(feature, machine, reason):
    found = why_not(feature, machine)
    assert (reason in found) if reason else not found


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("feature", [*FEATURES, *ON_GPUS_ONLY])
def test_only_ranks_that_exist_are_killed(feature, devices):
    layout = layouts_for(devices)[0]
    assert len(kills_with(feature, layout)) == 4
    assert all(int(kill.split("rank=")[1].split(",")[0]) < devices for kill in kills_with(feature, layout))


@pytest.mark.parametrize("libraries", [frozenset(), TE, frozenset({"apex"})], ids=["plain", "te", "apex"])
def test_upstream_is_asked_for_what_the_libraries_have(libraries):
    flags = gpu_flags(libraries)
    assert flags[flags.index("--distributed-backend") + 1] == "nccl"
    assert flags[flags.index("--transformer-impl") + 1] == ("transformer_engine" if libraries == TE else "local")
    assert "--use-cpu-initialization" not in flags
    assert ("--no-persist-layer-norm" in flags) == (not libraries)


@pytest.mark.skipif(not CHECKOUT, reason="MEGATRON_LM names no checkout of Megatron-LM")
def test_upstream_knows_every_flag_that_it_is_given():
    features = {**FEATURES, **ON_GPUS_ONLY}.values()
    jobs = [pretrain(*flags, recovery=False, device_flags=gpu_flags(has)) for flags in features for has in ((), TE)]
    given = {part for job in jobs for part in job.arguments if part.startswith("--")}
    code = """
import argparse, sys
sys.path.insert(0, sys.argv[1])
from megatron_flashrecovery.testing import cpu_device
cpu_device.install()
from megatron.training.arguments import add_megatron_arguments
parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
print(*[flag for flag in sys.argv[2:] if flag not in parser._option_string_actions])
"""
    command = [sys.executable, "-c", code, CHECKOUT, *sorted(given)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == []


def test_the_tests_that_need_a_gpu_are_collected_and_say_why_they_are_skipped():
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-q", "-rs", "-p", "no:cacheprovider"]
    blind = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=blind, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout
    assert "needs a GPU" in done.stdout
    assert " passed" not in done.stdout
