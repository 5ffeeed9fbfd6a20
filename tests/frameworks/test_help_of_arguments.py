"""Upstream's help is read once, in the fork server, and says the same."""

from __future__ import annotations

import argparse
import sys
from types import ModuleType
from typing import Any

import pytest

from megatron_flashrecovery.adapters.megatron_lm import hooks
from megatron_flashrecovery.adapters.megatron_lm.help_of_arguments import read_help, remember_help
from megatron_flashrecovery.runtime.fork_server import call_hooks


class Config:
    pass


class Derived(Config):
    pass


@pytest.fixture
def read() -> list[type]:
    """Whose source has been read."""
    return []


@pytest.fixture
def upstream(read: list[type]) -> ModuleType:
    """The class that upstream has in ``megatron/training/argument_utils.py``, by its names."""

    class ArgumentGroupFactory:
        def __init__(self, src_cfg_class: type) -> None:
            self.field_docstrings = self._get_field_docstrings(src_cfg_class)

        def _get_field_docstrings(self, src_cfg_class: type) -> dict[str, str]:
            read.append(src_cfg_class)
            said = {src_cfg_class.__name__: "help"}
            for base in src_cfg_class.__bases__:
                if base is not object:
                    said.update(self._get_field_docstrings(base))
            return said

    module: Any = ModuleType("argument_utils")
    module.ArgumentGroupFactory = ArgumentGroupFactory
    return module


def test_a_class_is_read_once_and_its_bases_too(upstream: Any, read: list[type]) -> None:
    remember_help(upstream)
    first = upstream.ArgumentGroupFactory(Derived).field_docstrings
    assert first == {"Derived": "help", "Config": "help"}
    assert upstream.ArgumentGroupFactory(Config).field_docstrings == {"Config": "help"}
    assert upstream.ArgumentGroupFactory(Derived).field_docstrings == first
    assert read == [Derived, Config]


def test_who_changes_what_was_told_changes_nothing_for_the_next_one(upstream: Any) -> None:
    remember_help(upstream)
    upstream.ArgumentGroupFactory(Config).field_docstrings.clear()
    assert upstream.ArgumentGroupFactory(Config).field_docstrings == {"Config": "help"}


def test_what_a_class_of_another_kind_makes_of_it_stays_its_own(upstream: Any) -> None:
    remember_help(upstream)

    class Loud(upstream.ArgumentGroupFactory):
        def _get_field_docstrings(self, src_cfg_class: type) -> dict[str, str]:
            return {name: said.upper() for name, said in super()._get_field_docstrings(src_cfg_class).items()}

    assert Loud(Derived).field_docstrings == {"Derived": "HELP", "Config": "HELP"}
    assert upstream.ArgumentGroupFactory(Derived).field_docstrings == {"Derived": "help", "Config": "help"}


def test_a_release_that_reads_no_source_is_left_alone() -> None:
    remember_help(ModuleType("argument_utils"))


def test_the_fork_server_reads_it_when_the_script_has_imported_upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    parsers = []
    arguments: Any = ModuleType("megatron.training.arguments")
    arguments.add_megatron_arguments = parsers.append
    monkeypatch.setitem(sys.modules, arguments.__name__, arguments)
    monkeypatch.setattr(hooks, "_installed", False)
    monkeypatch.setattr(hooks.wrapt, "register_post_import_hook", lambda *_: None)
    prepare = call_hooks(["megatron_flashrecovery.adapters.megatron_lm.hooks:install"])
    assert not parsers
    prepare()
    assert [type(parser) for parser in parsers] == [argparse.ArgumentParser]


def test_what_only_saves_time_ends_no_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = []

    def raises() -> None:
        raise ValueError("invalid literal for int(): ''")

    module: Any = ModuleType("some_hooks")
    module.raising, module.nothing, module.noting = lambda: raises, lambda: None, lambda: lambda: done.append(True)
    monkeypatch.setitem(sys.modules, "some_hooks", module)
    call_hooks(["some_hooks:raising", "some_hooks:nothing", "some_hooks:noting"])()
    assert done
    assert "invalid literal" in capsys.readouterr().err


def test_a_script_without_upstream_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "megatron.training.arguments", raising=False)
    read_help()
