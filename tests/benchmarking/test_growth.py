"""`vitcls benchmark --work growth` at toy size: comparisons, errors and the figure."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fresh_processes import run_fresh
from helpers.tiny_models import raises_one_line
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from modeling_vitcls.benchmarking import comparison, growth, work
from modeling_vitcls.benchmarking.comparison import BenchmarkSettings, Comparison, measure_peak_memory_in_process
from modeling_vitcls.benchmarking.growth import (
    BASE_POINT,
    GROWTH_AXES,
    GROWTH_POINTS,
    LINE_STYLES,
    MIN_PLOTTED_BYTES,
    PACKAGE_NAME,
    TOY_BASE_POINT,
    TOY_GROWTH_POINTS,
    build_peer,
    compare_point,
    format_caption,
    get_varied_field,
    plot_growth,
)
from modeling_vitcls.benchmarking.peers import PEERS, PEERS_WITH_REGISTERS, TOY_SIZE, Peer, build_random_images
from modeling_vitcls.benchmarking.tables import format_markdown, print_tables, write_reports
from modeling_vitcls.benchmarking.work import run_benchmarks
from modeling_vitcls.commands import benchmark


SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"
MEBIBYTE = 2**20
WRITTEN_FILES = {"output": ".json", "markdown": ".md", "plot": ".svg"}  # flag -> suffix


@pytest.fixture
def memory_requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Replace the processes that measure memory by constants; return the list of their arguments."""
    requests: list[tuple[str, ...]] = []

    def measure(module: str, *arguments: str) -> int:
        assert module == growth.__name__
        requests.append(arguments)
        return 100 if "--theirs" in arguments else 90

    monkeypatch.setattr(comparison, "measure_peak_memory_in_process", measure)
    return requests


# What is measured ----------------------------------------------------------------------------------------------------


def test_every_axis_leads_away_from_one_base_point() -> None:
    for table, base in ((GROWTH_POINTS, BASE_POINT), (TOY_GROWTH_POINTS, TOY_BASE_POINT)):
        varied = [get_varied_field(point, base) for point in table.values()]
        assert varied[0] is None and None not in varied[1:] and set(varied[1:]) == set(GROWTH_AXES)
        for point in table.values():
            assert sum(getattr(point, field) != getattr(base, field) for field in GROWTH_AXES) <= 1
            assert point.image_size % point.patch_size == 0
    assert GROWTH_POINTS["image size 448"].num_tokens == GROWTH_POINTS["patch size 8"].num_tokens == 785
    assert GROWTH_POINTS["64 registers"].num_tokens == 197 + 64
    assert {point.batch_size for point in GROWTH_POINTS.values()} >= {1, 32}


def test_all_points_are_compared(memory_requests: list[tuple[str, ...]]) -> None:
    """In one precision, and with all peers of --against that support the row: transformers' ViT has no registers."""
    peers = ("timm", "transformers")
    settings = BenchmarkSettings(peers, 2, is_toy=True, precision="bf16")
    entries = [result.to_dict() for result in run_benchmarks(("growth",), (), settings)]
    expected = [
        (name, peer) for name in TOY_GROWTH_POINTS for peer in peers if (name, peer) != ("4 registers", "transformers")
    ]
    assert [(entry["name"], entry["against"]) for entry in entries] == expected
    flags = ("--precision", "bf16", "--toy")
    assert memory_requests == [(*pair, *flags, *side) for pair in expected for side in ((), ("--theirs",))]
    for entry in entries:
        point = TOY_GROWTH_POINTS[entry["name"]]
        assert entry["work"] == "growth in bf16" and len(entry["ratios"]) == 2
        assert 0 < entry["largest_difference_of_outputs"] < 0.1
        assert entry["num_tokens"] == point.num_tokens and entry["axis"] == get_varied_field(point, TOY_BASE_POINT)
        assert (entry["ours_peak_bytes"], entry["theirs_peak_bytes"]) == (90, 100)
        size = vars(replace(TOY_SIZE, image_size=point.image_size, patch_size=point.patch_size))
        assert entry | vars(point) | {"precision": "bf16", "device": "cpu", "size": size} == entry
    assert json.dumps(entries)


@pytest.mark.parametrize(
    "name, against",
    [
        (name, against)
        for name, point in TOY_GROWTH_POINTS.items()
        for against in (PEERS_WITH_REGISTERS if point.num_registers else PEERS)
    ],
)
def test_models_do_the_work_that_the_point_says(name: str, against: str) -> None:
    point = TOY_GROWTH_POINTS[name]
    peer = build_peer(point, against, is_toy=True)
    ours: Any = peer.ours
    assert ours.config.image_size == point.image_size and ours.config.patch_size == point.patch_size
    assert ours.config.num_register_tokens == point.num_registers
    with torch.inference_mode():
        states = ours.vitcls(torch.zeros(1, 3, point.image_size, point.image_size)).last_hidden_state
    assert states.shape[1] == point.num_tokens


@pytest.mark.parametrize("against", PEERS)
def test_points_whose_outputs_differ_are_not_compared(against: str) -> None:
    name, point = next(iter(TOY_GROWTH_POINTS.items()))
    peer = build_peer(point, against, is_toy=True)
    with torch.no_grad():
        peer.ours.get_parameter("vitcls.layers.1.mlp.fc1.weight").mul_(1.5)
    with raises_one_line(f"{name} against {against}", "the outputs differ"):
        compare_point(name, point, peer, BenchmarkSettings((against,), 1, is_toy=True))


def test_wrong_requests_are_one_line() -> None:
    with raises_one_line("--rows: there is no row 'batch 3'", "'batch 32'"):
        next(run_benchmarks(("growth",), ("batch 3",), BenchmarkSettings(("timm",), 1)))
    with raises_one_line("64 registers", "Set --against timm"):
        next(run_benchmarks(("growth",), ("64 registers",), BenchmarkSettings(("transformers",), 1)))
    if not torch.cuda.is_available():
        with raises_one_line("--device cuda", "finds no GPU"):
            next(run_benchmarks(("growth",), (), BenchmarkSettings(("timm",), 1, is_toy=True, device="cuda")))


@pytest.mark.parametrize(
    "flags", [("--work", "inference", "--plot", "a.png"), ("--work", "growth", "--plot", "a.txt")]
)
def test_plots_that_cannot_be_made_are_refused_first(flags: tuple[str, ...]) -> None:
    done = run_fresh(SCRIPT, *flags)
    assert done.returncode == 2 and "--plot" in done.stderr and done.stderr.count("\n") == 1


def test_work_for_the_cpu_is_not_measured_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = BenchmarkSettings(("timm",), 1, is_toy=True, device="cuda")
    with raises_one_line("--work pixels probe", "inference, growth, step"):
        next(run_benchmarks(("inference", "pixels", "probe"), (), settings))


# Memory --------------------------------------------------------------------------------------------------------------


class AddBias(torch.nn.Module):
    def __init__(self, bias: float) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.tensor(bias))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return pixel_values + self.bias


def test_each_process_measures_the_side_of_its_flags(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The outputs of the two sides differ, and the difference is returned as their memory. The warm-up is a toy model
    with 2 images."""
    peer = Peer("timm", TOY_SIZE, AddBias(2.0), AddBias(1.0))
    monkeypatch.setattr(growth, "build_peer", lambda point, against, is_toy: peer)
    outputs: list[tuple[Any, ...]] = []

    def measure(warm_up: Callable[[], torch.Tensor], function: Callable[[], torch.Tensor]) -> int:
        output = function()
        outputs.append((output.dtype, tuple(output.shape), len(warm_up())))
        return round((output - build_random_images(1, 32)).mean().item())

    monkeypatch.setattr(growth, "measure_memory_growth", measure)
    for flags, expected in (((), 1), (("--theirs",), 2)):
        monkeypatch.setattr(sys, "argv", ["growth", "batch 1", "timm", "--toy", "--precision", "bf16", *flags])
        growth.main()
        assert int(capsys.readouterr().out) == expected
    assert outputs == [(torch.bfloat16, (1, 3, 32, 32), 2)] * 2
    assert peer.theirs.bias.dtype == torch.bfloat16


@pytest.mark.slow
def test_memory_grows_with_the_batch() -> None:
    for side in ((), ("--theirs",)):
        few, many = (
            measure_peak_memory_in_process(growth.__name__, name, "timm", *side) for name in ("batch 1", "batch 8")
        )
        assert 2 < many / few < 9


@pytest.mark.slow
def test_the_script_writes_all_three_files(tmp_path: Path) -> None:
    json_file, table, picture = tmp_path / "growth.json", tmp_path / "growth.md", tmp_path / "folder" / "growth.png"
    flags = ("--work", "growth", "inference", "--toy", "--pairs", "2", "--against", "timm", "--output", str(json_file))
    rows = ("4 registers", "fp32, batch 1")
    done = run_fresh(SCRIPT, *flags, "--rows", *rows, "--markdown", str(table), "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    found = json.loads(json_file.read_text())["comparisons"]
    assert [each["name"] for each in found] == list(rows)
    assert found[0]["ours_peak_bytes"] >= 0
    assert table.read_text().count("\n| ") == 2
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.width > 800


# The figure ----------------------------------------------------------------------------------------------------------


def made_up_comparisons() -> list[Comparison]:
    """Return comparisons in which ours takes 10 ms per image next to timm, which is 2 times as slow, and 14 ms next to
    transformers, which is 3 times as slow."""
    results = []
    for name, point in GROWTH_POINTS.items():
        for against, ours, ratio in (("transformers", 14.0, 3.0), ("timm", 10.0, 2.0)):
            if point.num_registers == 0 or against in PEERS_WITH_REGISTERS:
                speed = 1000 / ours
                details = {
                    **vars(point),
                    "num_tokens": point.num_tokens,
                    "axis": get_varied_field(point, BASE_POINT),
                    "precision": "fp32",
                    "device": "cpu",
                    "size": {"hidden_size": 384, "num_hidden_layers": 12},
                    "ours_peak_bytes": point.batch_size * MEBIBYTE,
                    "theirs_peak_bytes": 2 * point.batch_size * MEBIBYTE,
                }
                results.append(
                    Comparison("growth in fp32", name, against, [speed] * 3, [speed / ratio] * 3, 0.0, details)
                )
    return results


def get_lines(figure: Figure, index: int) -> dict[str, tuple[list[float], list[float]]]:
    """Return name -> (x values, y values) of the lines in one panel."""
    lines = figure.axes[index].get_lines()
    return {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}


def test_the_figure_has_a_column_for_each_axis() -> None:
    figure = plot_growth([result.to_dict() for result in made_up_comparisons()], "Some machine")
    assert [axes.get_title() for axes in figure.axes[:4]] == ["Image size", "Patch size", "Tokens", "Batch"]
    time, memory = get_lines(figure, 0), get_lines(figure, 7)
    assert set(time) == {PACKAGE_NAME, "timm", "transformers"}
    assert time[PACKAGE_NAME] == ([112, 160, 224, 320, 448], [pytest.approx(12.0)] * 5)  # the median
    assert time["timm"][1] == [pytest.approx(24.0)] * 5 and time["transformers"][1] == [pytest.approx(36.0)] * 5
    assert memory[PACKAGE_NAME] == ([1, 4, 8, 32], [1, 4, 8, 32])
    assert memory["timm"][1] == [2, 8, 16, 64]
    tokens = get_lines(figure, 2)
    assert tokens["timm"][0] == [197, 261, 325, 453] and tokens["transformers"][0] == [197]
    assert figure.axes[1].xaxis.get_inverted()


def test_the_figure_names_units_and_conditions() -> None:
    figure = plot_growth([result.to_dict() for result in made_up_comparisons()], "Some machine")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(LINE_STYLES)
    assert "ms" in figure.axes[0].get_ylabel() and "MiB" in figure.axes[4].get_ylabel()
    assert all(axes.get_xlabel() for axes in figure.axes[4:])
    caption = " ".join(figure.get_supxlabel().split())
    for part in ("fp32 on the CPU", "224 pixels, patch 16, batch 4", "3 pairs", "has no registers", "Some machine"):
        assert part in caption
    ticks = [label.get_text() for label in figure.axes[6].get_xticklabels()]
    assert ticks == ["197\n(0)", "261\n(64)", "325\n(128)", "453\n(256)"]


def test_the_caption_describes_the_measurements() -> None:
    entries = [result.to_dict() for result in made_up_comparisons()]
    assert format_caption(entries, "Some machine") == (
        "Inference in fp32 on the CPU: ViT, width 384, 12 layers; 224 pixels, patch 16, batch 4 unless varied; equal "
        "outputs. Medians of 3 pairs of measurements. The ViT of transformers has no registers. Some machine."
    )
    entries = [entry for entry in entries if entry["axis"] == "batch_size"]
    entries[0] |= {"device": "cuda", "precision": "bf16", "pairs": 2}
    assert format_caption(entries, "Some machine") == (
        "Inference in bf16 on the GPU: ViT, width 384, 12 layers; equal outputs. Medians of 2 pairs of measurements. "
        "Some machine."
    )


@pytest.mark.parametrize("axes", [tuple(GROWTH_AXES), ("image_size",)])
def test_no_text_is_cut_off(axes: tuple[str, ...]) -> None:
    some = [each.to_dict() for each in made_up_comparisons() if each.details["axis"] in axes]
    figure = plot_growth(some, "Some processor with a long name, 2 threads on 2 cores; versions of many libraries")
    FigureCanvasAgg(figure).draw()
    for text in figure.findobj(lambda artist: hasattr(artist, "get_text") and artist.get_visible()):
        extent = text.get_window_extent()
        assert not text.get_text() or (extent.x0 >= 0 and extent.x1 <= figure.bbox.x1), text.get_text()


def test_the_figure_shows_what_was_measured(tmp_path: Path) -> None:
    some = [each for each in made_up_comparisons() if each.details["axis"] == "batch_size" and each.against == "timm"]
    other = Comparison("inference", "row", "timm", [1.0], [1.0], 0.0, {})
    figure = plot_growth([each.to_dict() for each in (*some, other)], "Some machine")
    assert [axes.get_title() for axes in figure.axes] == ["Batch", ""]
    assert set(get_lines(figure, 0)) == {PACKAGE_NAME, "timm"}
    assert "unless varied" not in figure.get_supxlabel() and "registers" not in figure.get_supxlabel()
    write_reports([*some, other], None, None, tmp_path / "folder" / "growth.svg")
    assert "<svg" in (tmp_path / "folder" / "growth.svg").read_text()
    with raises_one_line("--plot requires growth"):
        plot_growth([other.to_dict()], "Some machine")


@pytest.mark.filterwarnings("error")
def test_memory_of_nothing_is_drawn_at_the_bottom() -> None:
    """A toy model may fit into memory that the process already has; logarithmic axes have no 0."""
    found = [each.to_dict() for each in made_up_comparisons()]
    for each in found:
        each["ours_peak_bytes"] = 0
    figure = plot_growth(found, "Some machine")
    FigureCanvasAgg(figure).draw()
    memory = get_lines(figure, 7)
    assert memory[PACKAGE_NAME][1] == [MIN_PLOTTED_BYTES / MEBIBYTE] * 4 and memory["timm"][1] == [2, 8, 16, 64]
    for each in found:
        each["theirs_peak_bytes"] = 0
    FigureCanvasAgg(plot_growth(found, "Some machine")).draw()


def test_the_command_writes_each_file_to_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    requests: list[tuple[Any, ...]] = []

    def run_benchmarks(*arguments: Any) -> Iterator[Comparison]:
        requests.append(arguments)
        yield from made_up_comparisons()

    monkeypatch.setattr(work, "run_benchmarks", run_benchmarks)
    files = {name: tmp_path / f"{name}{suffix}" for name, suffix in WRITTEN_FILES.items()}
    flags: dict[str, Any] = {"against": ("timm",), "rows": ("batch 1",), "pairs": 2, "precision": "bf16", "toy": True}
    benchmark.run(benchmark.BenchmarkOptions(("growth",), **flags, **files))
    assert requests == [(("growth",), ("batch 1",), BenchmarkSettings(("timm",), 2, True, "bf16", "cpu"))]
    assert "images per second" in capsys.readouterr().out
    assert len(json.loads(files["output"].read_text())["comparisons"]) == len(made_up_comparisons())
    load = re.compile(r"load [\d.]+")  # of the machine, which changes between the two calls
    assert load.sub("", files["markdown"].read_text()) == load.sub("", format_markdown(made_up_comparisons()))
    assert "<svg" in files["plot"].read_text()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_reports_name_the_accelerator_where_it_was_used(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Markdown, terminal and figure name it; measurements of the CPU on a machine with a GPU do not."""
    name = "Some accelerator"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    found = made_up_comparisons()
    found[-1].details["device"] = device
    file = tmp_path / "growth.svg"
    write_reports(found, None, None, file)
    print_tables(found)
    printed = capsys.readouterr().out
    assert "peak memory in MiB, excluding memory in use before the measurement" in printed
    reports = (format_markdown(found).splitlines()[-1], printed, file.read_text())
    assert [name in report for report in reports] == [device == "cuda"] * 3
    other = Comparison("pixels", "row", "transformers", [1.0], [1.0], 0.0, {})
    assert name not in format_markdown([other])
