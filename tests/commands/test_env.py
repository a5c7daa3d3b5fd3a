"""The report of `vitcls env` for bug reports."""

import importlib.metadata
import sys

import pytest
import torch
from helpers.command_in_process import run_here

from modeling_vitcls import cpu_kernels_vitcls as kernels
from modeling_vitcls.commands import env
from modeling_vitcls.version import __version__


def test_the_environment_of_a_bug_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("VITCLS_CPU_KERNELS", raising=False)
    assert run_here("env") == 0
    printed = capsys.readouterr().out
    facts = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert facts["modeling_vitcls"] == __version__ and {"torch", "transformers", "devices"} <= facts.keys()
    assert facts["timm"] == importlib.metadata.version("timm")
    assert "hf_secret" not in printed
    lines = [line.split("  ", maxsplit=1) for line in printed.splitlines()]
    named = {name: text.strip() for name, text in lines}
    assert named["devices"] == env.describe_devices() and named["CPU kernels"] == env.describe_cpu_kernels()
    if not torch.cuda.is_available():
        assert named["devices"] == f"CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"

    monkeypatch.setenv("VITCLS_CPU_KERNELS", "0")
    assert env.describe_cpu_kernels() == "off: VITCLS_CPU_KERNELS is 0"
    monkeypatch.delenv("VITCLS_CPU_KERNELS")
    monkeypatch.setattr(kernels, "HAS_PRIVATE_NAMES", False)
    assert "lacks a private API" in env.describe_cpu_kernels()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the names are read from /proc")
def test_the_environment_names_the_instructions_for_bf16_and_int8(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("env") == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("instructions"))
    named = ("avx512_bf16" in line, "amx_bf16" in line, "vnni" in line)
    checks = (torch.cpu._is_avx512_bf16_supported, torch.cpu._is_amx_tile_supported, torch.cpu._is_vnni_supported)
    assert named == tuple(check() for check in checks)


def test_the_environment_names_the_kernels_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VITCLS_CPU_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "MIN_MULTIPLICATIONS", {(torch.float32, "a"): 1, (torch.bfloat16, "a"): 1})
    assert env.describe_cpu_kernels() == "on, oneDNN for bfloat16, float32"
    monkeypatch.setattr(kernels, "MIN_MULTIPLICATIONS", {})
    for has_onednn, reason in ((True, "this CPU has no AVX-512"), (False, "this PyTorch build has no oneDNN")):
        monkeypatch.setattr(kernels, "HAS_ONEDNN", has_onednn)
        assert env.describe_cpu_kernels() == f"on, without oneDNN: {reason}"
    with torch.backends.mkldnn.flags(enabled=False):
        assert env.describe_cpu_kernels() == "off: torch.backends.mkldnn is disabled"
