"""The set-up script refuses what it cannot work with, before it installs anything."""

import sys

import pytest

from lwz_trainer import bootstrap


def test_main_refuses_an_old_python(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    monkeypatch.setattr(bootstrap, "_set_up", lambda: pytest.fail("it went on"))
    assert bootstrap.main(["setup"]) == 2
    assert "Python 3.11 or newer is needed" in capsys.readouterr().err


def test_main_refuses_an_unknown_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "_set_up", lambda: pytest.fail("it went on"))
    assert bootstrap.main(["demonstrate"]) == 2
    assert bootstrap.main([]) == 2
