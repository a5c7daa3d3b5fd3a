"""The report of `vitcls env` for bug reports."""

from helpers.command_in_process import run_here
from pytest import CaptureFixture, MonkeyPatch

from modeling_vitcls.version import __version__


def test_the_environment_names_versions_and_the_machine_but_no_secrets(
    monkeypatch: MonkeyPatch, capsys: CaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("VITCLS_CPU_KERNELS", "0")
    assert run_here("env") == 0
    printed = capsys.readouterr().out
    facts = {
        name: text.strip()
        for name, text in (line.split("  ", maxsplit=1) for line in printed.splitlines())
    }
    assert facts["modeling_vitcls"] == __version__
    assert facts["CPU kernels"] == "off"
    assert "hf_secret" not in printed
