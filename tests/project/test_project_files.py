"""The commands that the documents name exist, and figures are never typed by hand."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from bench import place, readme, report
from bench.__main__ import benches
from bench.__main__ import main as bench_main
from bench.report import Figure
from megatron_flashrecovery import __version__

ROOT = Path(__file__).parents[2]
VERBS = {"demo", "test", "check", "storm", "bench", "gpu", "clean"}


def text_of(name):
    return (ROOT / name).read_text()


def test_the_makefile_has_the_verbs():
    assert set(re.findall(r"^([a-z]+):", text_of("Makefile"), re.MULTILINE)) >= VERBS


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_a_document_names_only_verbs_and_subcommands_that_exist(document):
    text = text_of(document)
    assert set(re.findall(r"^make ([a-z]+)", text, re.MULTILINE)) <= VERBS
    for command in re.findall(r"flashrecovery ([a-z]+) ", text):
        assert (ROOT / "megatron_flashrecovery" / "commands" / f"{command}.py").is_file(), command


def test_links_between_documents_lead_somewhere():
    for document in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text_of(document)):
            assert (ROOT / target).exists(), f"{document}: {target}"


def test_the_modules_that_the_codemap_names_exist():
    rows = re.findall(r"^\| ((?:`[a-z_/, `]+`(?:, )?)+) \|", text_of("ARCHITECTURE.md"), re.MULTILINE)
    named = []
    for row in rows:
        names = re.findall(r"`([a-z_/]+)`", row)
        folder = names[0].rpartition("/")[0]
        named += [name if "/" in name else f"{folder}/{name}" for name in names]
    assert named
    for name in named:
        places = (ROOT / name, ROOT / "megatron_flashrecovery" / name, ROOT / f"megatron_flashrecovery/{name}.py")
        assert any(place.exists() for place in places), name


def test_ci_runs_the_commands_of_the_readme():
    assert "make check test" in text_of(".ci/run")
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_installing_needs_no_framework_but_the_extras_name_them():
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    assert not [name for name in project["dependencies"] if "megatron" in name or "deepspeed" in name]
    assert set(project["optional-dependencies"]) == {"megatron", "deepspeed", "gpu", "diagnose", "test"}
    assert project["scripts"] == {"flashrecovery": "megatron_flashrecovery.cli:main"}


def test_torch_is_pinned_where_tests_install_it_and_that_version_is_a_tested_one():
    from megatron_flashrecovery.commands.run import TESTED_TORCH

    (pinned,) = re.findall(r"TORCH \?= torch==([\d.]+)", text_of("Makefile"))
    assert any(pinned.startswith(f"{version}.") for version in TESTED_TORCH)


def test_a_shell_without_venv_is_told_in_one_line(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$2" in "import venv"*) exit 1;; esac\nexit 0\n')
    python.chmod(0o755)
    command = ["make", "-s", "install", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert "has no venv module: install it" in found.stderr
    assert not (tmp_path / "venv").exists()


def test_the_version_is_told(capsys):
    from megatron_flashrecovery.cli import main

    with pytest.raises(SystemExit, match="0"):
        main(["--version"], {})
    assert capsys.readouterr().out.strip() == __version__


FIGURES = [
    Figure("kill to first step", 1.2, "s", at_most=1.5),
    Figure("throughput", 0.5, "of gloo", at_least=0.8),
    Figure("cpu", 3.0, "s/GiB"),
]


def test_a_report_has_the_fields_that_others_script_against(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    path = report.write("recovery", FIGURES, {"kill to first step": [1.1, 1.2, 1.3]})
    found = json.loads(path.read_text())
    assert path.name == "recovery.json"
    assert found["figures"][0] == {
        "name": "kill to first step",
        "value": 1.2,
        "unit": "s",
        "target": "<= 1.5",
        "met": True,
    }
    assert [figure["met"] for figure in found["figures"]] == [True, False, None]
    assert found["samples"] == {"kill to first step": [1.1, 1.2, 1.3]}
    assert found.keys() == {"figures", "machine", "commit", "samples"}
    assert "MISSED" in capsys.readouterr().out


def test_the_readme_gets_its_figures_from_the_results(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    report.write("recovery", FIGURES, {})
    table = readme.figures_table(tmp_path)
    assert "| throughput | 0.5 of gloo | >= 0.8 | **missed** | `make bench BENCH=recovery` |" in table
    once = readme.with_figures(text_of("README.md"), table)
    assert table in once
    assert readme.with_figures(once, table) == once


def test_figures_of_gpus_stand_beside_those_of_the_host(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    report.write("recovery", FIGURES, {})
    before = (tmp_path / "recovery.json").read_text()
    monkeypatch.setattr(report, "machine", lambda: {"gpu": "NVIDIA H100", "gpus": 8})
    path = report.write("recovery", FIGURES[:1], {})
    assert path == tmp_path / "gpu" / "recovery.json"
    assert (tmp_path / "recovery.json").read_text() == before
    table = readme.figures_table(tmp_path)
    assert "On 8 x NVIDIA H100:" in table
    assert table.endswith("| kill to first step | 1.2 s | <= 1.5 | yes | `make gpu` |")


def test_on_gpus_only_benches_that_exist_and_train_are_run(capsys):
    assert place.benches_of_gpus(0) == place.benches_of_gpus(1) == ()
    assert set(place.benches_of_gpus(2)) <= set(benches()) - {"scale", "mirror"}
    if not place.devices():
        assert bench_main(["gpu"]) == 0
        assert "not measured" in capsys.readouterr().err


def test_the_readme_quotes_what_was_measured():
    assert readme.figures_table(report.RESULTS) in text_of("README.md")


def test_an_unknown_bench_is_bad_input(capsys):
    assert bench_main(["nothing"]) == 2
    assert "there is no bench 'nothing'" in capsys.readouterr().err
    assert "report" not in benches()
