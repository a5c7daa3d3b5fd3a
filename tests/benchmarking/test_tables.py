"""Tables and files of benchmark results."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers.benchmark_results import check_file

from modeling_vitcls.benchmarking import tables
from modeling_vitcls.benchmarking.comparison import Comparison
from modeling_vitcls.benchmarking.tables import (
    compute_lowest_ratios,
    format_markdown,
    print_comparison,
    print_tables,
    write_reports,
)


def test_the_lowest_ratio_is_that_of_the_faster_peer() -> None:
    results = [
        Comparison("work", "row", peer, [6.0] * 3, [theirs] * 3, 0.0, {}) for peer, theirs in (("a", 3.0), ("b", 4.0))
    ]
    single = Comparison("work", "other", "a", [1.0], [1.0], 0.0, {"ours_peak_bytes": 90, "theirs_peak_bytes": 100})
    assert compute_lowest_ratios([*results, single]) == {("work", "row"): 1.5}
    lines = format_markdown([*results, single]).splitlines()
    assert lines[0] == "| work | images/s | times as fast (quartiles) | peak memory, vitcls / baseline |"
    assert lines[2] == "| work: row | 6.0 | a 2.00 (2.00 to 2.00), b 1.50 (1.50 to 1.50) |  |"
    assert lines[3] == "| work: other | 1.0 | a 1.00 (1.00 to 1.00) | a 0.90 |"
    assert "Medians of 1 to 3 pairs" in lines[5]
    lines = format_markdown(results).splitlines()
    assert lines[:2] == ["| work | images/s | times as fast (quartiles) |", "|---|---|---|"]
    assert lines[2] == "| work: row | 6.0 | a 2.00 (2.00 to 2.00), b 1.50 (1.50 to 1.50) |"


def test_the_machine_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("os.getloadavg", lambda: (1.25, 2.0, 3.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(tables, "get_processor_name", lambda: "Some processor")
    monkeypatch.setattr(tables, "get_versions", lambda *libraries: {"python": "3", **dict.fromkeys(libraries, "1")})
    result = Comparison("work", "row", "a", [1.0], [1.0], 0.0, {"device": "cpu"})
    assert tables.describe_machine([result]) == "Some processor, 2 threads on 4 cores, load 1.2; python 3, timm 1"


def test_reports_contain_the_measured_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ratios 2 to 4 of the first peer, and 1.5 of the second peer; 3 MiB and 4 MiB of memory."""
    peaks = {"ours_peak_bytes": 3 * 2**20, "theirs_peak_bytes": 4 * 2**20, "device": "cpu"}
    results = [
        Comparison("work", "row", "first", [6.0, 9.0, 8.0], [3.0, 3.0, 2.0], 1e-6, peaks),
        Comparison("work", "row", "second", [6.0] * 3, [4.0] * 3, 1e-7, {}),
    ]
    assert print_comparison(results[0]) is results[0]
    assert capsys.readouterr().out == "work: row, against first: 3.00 times as fast (2.50 to 3.50)\n"
    print_tables(results)
    cells = [re.split(r"\s*[│┃]\s*", line.strip("│┃ ")) for line in capsys.readouterr().out.splitlines()]
    for row in (
        ["work: row", "first", "8.0", "3.0", "3.00", "2.50 to 3.50"],
        ["work: row", "second", "6.0", "4.0", "1.50", "1.50 to 1.50"],
        ["work: row", "1.50"],
        ["work: row", "first", "3", "4"],
    ):
        assert row in cells, row
    assert ["work: row", "second", "6", "4"] not in cells  # without measured memory
    more = Comparison("work", "other", "first", [1.0] * 12, [1.0] * 12, 0.0, {"theirs_peak_bytes": 0})
    _, _, row, other, _, caption = format_markdown([*results, more]).splitlines()
    assert row == "| work: row | 7.0 | first 3.00 (2.50 to 3.50), second 1.50 (1.50 to 1.50) | first 0.75 |"
    assert other == "| work: other | 1.0 | first 1.00 (1.00 to 1.00) |  |"
    assert caption.startswith("Medians of 3 to 12 pairs of measurements. ")
    write_reports(results, tmp_path / "new" / "results.json", None, None)
    first, second = check_file(tmp_path / "new" / "results.json", 3)
    assert (first["ratio"], first["quartiles"], first["ratios"]) == (3.0, [2.5, 3.5], [2.0, 3.0, 4.0])
    assert (first["ours_images_per_second"], first["theirs_images_per_second"]) == (8.0, 3.0)
    assert (first["largest_difference_of_outputs"], first["ours_peak_bytes"]) == (1e-6, 3 * 2**20)
    assert second["against"] == "second" and "ours_peak_bytes" not in second
    lowest = json.loads((tmp_path / "new" / "results.json").read_text())["over_the_better"]
    assert lowest == [{"work": "work", "name": "row", "ratio": 1.5}]
