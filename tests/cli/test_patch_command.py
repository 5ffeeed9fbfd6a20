"""The patch command, on a checkout that has as much of Megatron-LM as the command looks at."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_flashrecovery.cli import main
from megatron_flashrecovery.core.errors import RecordDamaged
from megatron_flashrecovery.patching import megatron_lm
from megatron_flashrecovery.patching.insertions import parse
from megatron_flashrecovery.patching.megatron_lm import Known, known_versions, make_patch
from megatron_flashrecovery.patching.seams import Seam, read_seam

ARGUMENTS = """\
def add_megatron_arguments(parser):
    parser = more(parser)

    return parser


def validate_args(args, defaults={}):

    # Why the next line is there.
    args.checked = True
    return args
"""
TRAINING = "".join(f"from elsewhere import {name}\n" for name in megatron_lm.REPLACED if name != "train_step")
TRAINING += "\n\ndef train_step(forward_step_func, data_iterator):\n    return 1\n"
TIMERS = "class Timer:\n    def start(self, barrier=False):\n        pass\n"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "Megatron-LM"
    for path, text in {
        "megatron/training/arguments.py": ARGUMENTS,
        "megatron/training/training.py": TRAINING,
        "megatron/core/timers.py": TIMERS,
        "megatron/core/package_info.py": 'MAJOR = 0\nMINOR = 99\nPATCH = 1\nPRE_RELEASE = ""\n',
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    seams = [seam(root, *place) for place in (("megatron/training/training.py", "train_step"),)]
    known = Known("core_v0.99.1", make_patch(root), tuple(seams))
    versions = [known]
    monkeypatch.setattr(megatron_lm, "known_versions", lambda: versions)
    monkeypatch.setattr("megatron_flashrecovery.commands.patch.known_versions", lambda: versions)
    return root


def seam(root: Path, file: str, name: str) -> Seam:
    found = read_seam(root, file, name)
    assert found is not None
    return found


def arguments_of(root: Path) -> str:
    return (root / "megatron/training/arguments.py").read_text()


def test_apply_twice_and_revert_leave_the_tree_as_it_was(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    assert main(["patch", "apply", str(checkout)]) == 0
    once = arguments_of(checkout)
    assert "'--enable-flash-recovery'" in once
    assert once.index("require_launcher()") < once.index("# Why the next line is there.")
    compile(once, "arguments.py", "exec")
    assert main(["patch", "apply", str(checkout)]) == 0
    assert arguments_of(checkout) == once
    assert main(["patch", "check", str(checkout)]) == 0
    said = capsys.readouterr().out
    assert "Megatron-LM 0.99.1 (core_v0.99.1), patch applied" in said
    assert main(["patch", "revert", str(checkout)]) == 0
    assert main(["patch", "revert", str(checkout)]) == 0
    assert {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()} == before


def test_a_tree_that_somebody_has_changed_is_refused_and_left_alone(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = ARGUMENTS + "\n# mine\n"
    (checkout / "megatron/training/arguments.py").write_text(mine)
    for verb in ("apply", "revert"):
        assert main(["patch", verb, str(checkout)]) == 2
        assert "somebody has changed" in capsys.readouterr().err
    assert arguments_of(checkout) == mine
    main(["patch", "check", str(checkout)])
    assert "megatron/training/arguments.py: changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("now", "difference"),
    [
        (TRAINING.replace("return 1", "return 2"), "train_step has another body\n"),
        (TRAINING.replace(", data_iterator)", ", data_iterator, iteration)"), "also takes iteration\n"),
        (TRAINING.replace(", data_iterator)", ")"), "no longer takes data_iterator: recovery will not work"),
        (TRAINING.replace("train_step", "take_step"), "train_step is gone: recovery will not work"),
    ],
)
def test_check_names_what_upstream_has_moved(
    checkout: Path, capsys: pytest.CaptureFixture[str], now: str, difference: str
) -> None:
    (checkout / "megatron/training/training.py").write_text(now)
    assert main(["patch", "check", str(checkout)]) == 1
    assert difference in capsys.readouterr().out


def test_check_names_what_hooks_would_not_find(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkout / "megatron/training/training.py").write_text(
        TRAINING.replace("import print_datetime", "import print_date")
    )
    assert main(["patch", "check", str(checkout)]) == 1
    assert "knows no print_datetime" in capsys.readouterr().out


def test_a_changed_file_hides_nothing(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkout / "megatron/training/arguments.py").write_text(ARGUMENTS.replace("def validate_args", "def validate"))
    known = megatron_lm.known_versions()[0]
    seams = (*known.seams, Seam("megatron/training/arguments.py", "validate_args", ("args", "defaults"), ""))
    moved = megatron_lm.Checkout(checkout).moved(Known(known.tag, known.patch, seams))
    assert [(each.seam.name, each.difference) for each in moved] == [("validate_args", "is gone")]


def test_line_ends_and_links_stay_as_they_are(checkout: Path, tmp_path: Path) -> None:
    file = checkout / "megatron/training/arguments.py"
    real = tmp_path / "shared.py"
    file.rename(real)
    file.symlink_to(real)
    assert main(["patch", "apply", str(checkout)]) == 0
    assert file.is_symlink()
    assert main(["patch", "revert", str(checkout)]) == 0
    assert real.read_text() == ARGUMENTS
    real.write_bytes(ARGUMENTS.replace("\n", "\r\n").encode())
    before = real.read_bytes()
    assert main(["patch", "apply", str(checkout)]) == 2
    assert real.read_bytes() == before


@pytest.mark.parametrize(
    "file", ["megatron/training/arguments.py", "megatron/training/training.py", "megatron/core/package_info.py"]
)
def test_a_file_that_is_missing_or_no_python_is_named(
    checkout: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    known = megatron_lm.known_versions()[0]
    seams = (*known.seams, Seam("megatron/training/arguments.py", "validate_args", ("args", "defaults"), ""))
    megatron_lm.known_versions()[0] = Known(known.tag, known.patch, seams)
    (checkout / file).write_text("a = 1\n<<<<<<< HEAD\n")
    assert main(["patch", "check", str(checkout)]) == 2
    assert f"{file} line 2 is no Python (invalid syntax): a merge conflict?" in capsys.readouterr().err
    (checkout / file).unlink()
    assert main(["patch", "check", str(checkout)]) == 2
    assert f"is no checkout of Megatron-LM: it has no {file}" in capsys.readouterr().err


def test_what_is_no_checkout_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["patch", "check", str(tmp_path)]) == 2
    assert "is no checkout of Megatron-LM" in capsys.readouterr().err


def test_every_known_version_has_a_patch_of_insertions_and_its_seams() -> None:
    known = known_versions()
    assert [each.tag for each in known] == [
        *("core_v0.15.3", "core_v0.16.1", "core_v0.17.1", "core_v0.18.2", "core_v0.19.0", "main_2026-08-22"),
    ]
    for each in known:
        (patch,) = each.patch.values()
        inserted = [line for insertion in patch.insertions for line in insertion.lines]
        assert any("--enable-flash-recovery" in line for line in inserted)
        assert len(each.seams) == len(megatron_lm.WATCHED)


def test_a_patch_with_anything_but_insertions_is_refused(tmp_path: Path) -> None:
    patch = tmp_path / "bad.patch"
    patch.write_text("before: a\nafter: b\n--- a/x\n+++ b/x\n@@ -1,1 +1,1 @@\n-old\n+new\n")
    with pytest.raises(RecordDamaged, match="no patch of insertions"):
        parse(patch)
