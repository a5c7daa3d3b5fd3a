"""scripts/benchmark.py at toy size: what it compares, what it writes, and that it compares nothing that differs."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from tiny_models import raises_one_line

from modeling_vitcls.benchmarking import attention_reads, image_processing, training_steps
from modeling_vitcls.benchmarking.attention_reads import ATTENTION_READS, check_same, work
from modeling_vitcls.benchmarking.comparison import Comparison, chosen, in_turns, quartiles
from modeling_vitcls.benchmarking.forward_passes import FORWARD_PASSES, ForwardPass, compare_forward_pass
from modeling_vitcls.benchmarking.image_processing import PIXEL_ROWS, compare_files, write_photographs
from modeling_vitcls.benchmarking.inexact import INEXACT, check_off, compare_inexact, model_of
from modeling_vitcls.benchmarking.peers import PEERS, SMALL, TOY
from modeling_vitcls.benchmarking.predictions import PREDICTION_ROWS, Side, check_labels
from modeling_vitcls.benchmarking.probes import PROBES, check_weights
from modeling_vitcls.benchmarking.tables import better_peers, markdown
from modeling_vitcls.benchmarking.training_runs import DIGITS, TRAINING_RUNS, Contestant, prepare_models
from modeling_vitcls.benchmarking.training_steps import TRAINING_STEPS, check_gradients, compare_step, sides
from modeling_vitcls.benchmarking.work import WORK, Plan, compare
from modeling_vitcls.conversion.random_weights import random_fill


SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"
KEYS = {
    "work",
    "name",
    "against",
    "ratio",
    "quartiles",
    "pairs",
    "ours_images_per_second",
    "theirs_images_per_second",
    "ratios",
    "largest_difference_of_outputs",
}


def run_script(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def check_file(file: Path, num_pairs: int) -> list[dict[str, Any]]:
    """The comparisons in a results file, whose figures fit each other."""
    results = json.loads(file.read_text())
    assert {"processor", "cores", "threads", "load"} <= set(results["machine"])
    assert {"modeling_vitcls", "torch", "transformers", "timm"} <= set(results["versions"])
    for found in results["comparisons"]:
        assert set(found) >= KEYS
        assert found["pairs"] == len(found["ratios"]) == num_pairs and min(found["ratios"]) > 0
        assert found["quartiles"][0] <= found["ratio"] <= found["quartiles"][1]
    return results["comparisons"]


def test_the_script_compares_forward_passes(tmp_path: Path) -> None:
    file, table = tmp_path / "folder" / "results.json", tmp_path / "other" / "table.md"
    row = "fp32, batch 1"
    flags = ("--work", "inference", "--rows", row, "--toy", "--pairs", "3", "--markdown", str(table))
    done = run_script(*flags, "--output", str(file))
    assert done.returncode == 0, done.stderr
    found = check_file(file, 3)
    assert [(each["name"], each["against"]) for each in found] == [(row, "transformers"), (row, "timm")]
    assert "images per second" in done.stdout and "over the better" in done.stdout and "torch" in done.stdout
    (better,) = json.loads(file.read_text())["over_the_better"]
    assert better == {"work": "inference", "name": row, "ratio": min(each["ratio"] for each in found)}
    assert table.read_text().count("\n| ") == 1 and "torch" in table.read_text()


@pytest.mark.slow
def test_the_script_compares_steps(tmp_path: Path) -> None:
    """The memory is that of processes of their own."""
    file = tmp_path / "results.json"
    flags = ("--work", "inference", "step", "--rows", "fp32, batch 16", "--against", "timm", "--toy", "--pairs", "2")
    done = run_script(*flags, "--output", str(file))
    assert done.returncode == 0, done.stderr
    (found,) = check_file(file, 2)
    assert found["work"] == "training step" and "MiB" in done.stdout
    assert found["ours_peak_bytes"] > 0 and found["theirs_peak_bytes"] > 0


@pytest.mark.slow
def test_the_script_compares_reading_attention(tmp_path: Path) -> None:
    """With a plain forward pass: its time, and the memory of both sides, each in a process of its own."""
    file = tmp_path / "results.json"
    row = "token_attention, batch 16"
    done = run_script("--work", "attention", "--toy", "--pairs", "2", "--rows", row, "--output", str(file))
    assert done.returncode == 0, done.stderr
    (found,) = check_file(file, 2)
    assert (found["name"], found["against"]) == (row, "a plain forward pass")
    assert found["ours_peak_bytes"] >= 0 and found["theirs_peak_bytes"] >= 0
    assert found["largest_difference_of_outputs"] < 1e-5
    assert "images per second" in done.stdout and "MiB" in done.stdout


@pytest.mark.parametrize("name", ["pixels", "prediction", "probe"])
def test_work_without_peers_is_compared(name: str) -> None:
    plan = Plan(("transformers",), 2, toy=True)
    found = list(compare((name,), (), plan))
    assert [each.name for each in found] == list(WORK[name].rows)
    assert all(len(each.ratios) == 2 and each.difference < 1e-4 for each in found)
    assert all("ratio" in each.as_dict() for each in found)


@pytest.mark.slow
@pytest.mark.parametrize("against", PEERS)
def test_compiled_models_are_compared(against: str) -> None:
    row = replace(FORWARD_PASSES["bf16, batch 16, compiled"], batch_size=2)
    assert row.compiled
    assert compare_forward_pass("row", row, PEERS[against](TOY), 1, toy=True).difference < 0.1


@pytest.mark.parametrize("name", ATTENTION_READS)
def test_attention_is_read_right_before_it_is_measured(name: str) -> None:
    row = ATTENTION_READS[name]
    model, pixel_values = work(row.batch_size, toy=True)
    assert len(pixel_values) == row.batch_size
    assert check_same(row, model, pixel_values, name) < 1e-5
    assert attention_reads.images_per_second(row.look, model, pixel_values, 0.0) > 0
    assert model.config._attn_implementation == "sdpa"
    wrong = replace(row, look=lambda model, pixels: row.look(model, pixels) + 0.1, same=row.look)
    with raises_one_line(name, "differ by 0.1"):
        check_same(wrong, model, pixel_values, name)
    broken = replace(row, look=lambda model, pixels: row.look(model, pixels) * float("nan"), same=row.look)
    with raises_one_line("differ by nan"):
        check_same(broken, model, pixel_values, name)


def test_memory_is_the_peak_of_a_process() -> None:
    """64 MiB that are gone again at the end count, what stays after the warm-up does not.

    In a fresh process, as it is measured: one that has run other tests holds free memory, which 64 MiB may fit into.
    """
    code = """
        import torch
        from modeling_vitcls.benchmarking.memory import growth
        work = lambda num_images: torch.ones(num_images, 2**20)  # 4 MiB for an image
        print(growth(lambda: work(1), lambda: work(16)))
    """
    done = subprocess.run([sys.executable, "-c", dedent(code)], capture_output=True, text=True, check=True)
    assert 50 * 2**20 < int(done.stdout) < 100 * 2**20


@pytest.mark.parametrize("against", PEERS)
@pytest.mark.parametrize("name", TRAINING_STEPS)
def test_gradients_are_compared_before_steps_are_measured(name: str, against: str) -> None:
    ours, theirs = sides(TRAINING_STEPS[name], PEERS[against](TOY))
    assert check_gradients(ours, theirs, name) < ours.row.limit
    before = [parameter.detach().clone() for parameter in ours.model.parameters()]
    ours()
    assert not all(map(torch.equal, before, ours.model.parameters()))
    with torch.no_grad():
        theirs.model.get_parameter("classifier.weight" if against == "transformers" else "head.weight").neg_()
    with raises_one_line(name, "the gradients differ"):
        check_gradients(ours, theirs, name)


def test_pixels_that_differ_are_not_compared(tmp_path: Path) -> None:
    files = image_processing.photographs(tmp_path, toy=True)
    ours, theirs = image_processing.image_processors(TOY, tmp_path)
    name, row = next(iter(PIXEL_ROWS.items()))
    ours.resample = 3
    with raises_one_line(name, "the pixel values differ"):
        compare_files(name, row, files, ours, theirs, 1, 0.0)


def test_labels_and_weights_that_differ_are_not_compared() -> None:
    name = next(iter(PREDICTION_ROWS))
    cat = ("cat", 0.5)
    assert check_labels([cat, cat], [cat, ("cat", 0.50005)], name) == pytest.approx(5e-5)
    with raises_one_line(name, "picture 1 is cat for us and dog"):
        check_labels([cat, cat], [cat, ("dog", 0.5)], name)
    with raises_one_line(name, "differ by 0.1"):
        check_labels([cat], [("cat", 0.6)], name)
    probe = next(iter(PROBES))
    assert check_weights(torch.ones(2), torch.ones(2), probe) == 0
    with raises_one_line(probe, "differ by 0.5"):
        check_weights(torch.tensor([1.0, 0.5]), torch.ones(2), probe)


@pytest.mark.slow
def test_a_side_that_fails_says_why(tmp_path: Path) -> None:
    with Side("nobody's", str(tmp_path), toy=True) as side, raises_one_line("nobody's failed", "choose from"):
        side.ask("labels", 1)


@pytest.mark.slow
def test_the_script_compares_training(tmp_path: Path) -> None:
    """Two real training runs, one suspended while the other has its turn."""
    file = tmp_path / "results.json"
    done = run_script("--work", "training", "--toy", "--pairs", "2", "--output", str(file))
    assert done.returncode == 0, done.stderr
    (found,) = check_file(file, 2)
    assert found["name"] == "toy" and found["dataset"] == "digits"
    assert 0 <= found["largest_difference_of_outputs"] < 1e-4


def test_wrong_flags_are_one_line() -> None:
    plan = Plan(("timm",), 1, toy=True)
    with raises_one_line("--rows: there is no 'fp64'", "'bf16, batch 1'", "'10 epochs, batch 16'"):
        next(compare(("inference", "probe"), ("fp64",), plan))
    done = run_script("--work", "training", "--pairs", "0")
    assert done.returncode == 2 and "--pairs is 0" in done.stderr


@pytest.mark.parametrize("against", PEERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_differ_are_not_compared(against: str, dtype: torch.dtype) -> None:
    peer = PEERS[against](TOY)
    found = compare_forward_pass("row", ForwardPass(dtype, 2), peer, 1, toy=True)
    assert found.against == against and found.difference < 0.1
    with torch.no_grad():
        peer.ours.get_parameter("vitcls.layers.1.mlp.fc1.weight").mul_(1.5)
    with raises_one_line(f"row against {against}", "the outputs differ"):
        compare_forward_pass("row", ForwardPass(dtype, 2), peer, 1, toy=True)


def test_rows_say_where_they_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_steps, "peak_in_a_process", lambda *arguments: 1)
    found = compare_forward_pass("row", ForwardPass(torch.float32, 2), PEERS["timm"](TOY), 1, toy=True)
    row = replace(TRAINING_STEPS["fp32, batch 16"], batch_size=2)
    for each in (found, compare_step("row", row, PEERS["timm"](TOY), 1, toy=True)):
        assert each.as_dict()["device"] == "cpu"


def test_what_is_inexact_is_compared_with_the_plain_model() -> None:
    """Which drops and merges nothing; so does the other one, once its feature is set to 0."""
    plan = Plan(("timm",), 1, toy=True)
    names = [name for name in INEXACT if " 4," in name or " 0.5," in name]
    found = [comparison.as_dict() for comparison in compare(("inexact",), tuple(names), plan)]
    assert [(each["name"], each["against"]) for each in found] == [(name, "the plain model") for name in names]
    assert [each.get("merged_patches_per_layer") for each in found] == [4, None]
    assert [each.get("patch_drop_rate") for each in found] == [None, 0.5]
    assert all(each["device"] == "cpu" and each["largest_difference_of_outputs"] == 0 for each in found)
    merging = model_of(TOY, merged_patches_per_layer=4)
    random_fill(merging)
    with raises_one_line(names[0], "set to 0", "the outputs differ"):
        check_off(INEXACT[names[0]], merging, TOY, names[0])


@pytest.mark.parametrize("name", INEXACT)
def test_the_inexact_side_is_what_its_row_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row, sides = INEXACT[name], []
    monkeypatch.setitem(INEXACT, name, replace(row, work=lambda model, *others: sides.append(model) or (lambda: 1.0)))
    (found,) = compare_inexact((name,), 1, toy=True)
    assert [getattr(model.config, row.field) for model in sides] == [row.value, 0]
    assert found.ratios == [1.0]


def test_no_numbers_are_not_compared() -> None:
    peer = PEERS["transformers"](TOY)
    with torch.no_grad():
        peer.ours.get_parameter("classifier.bias").fill_(float("nan"))
    with raises_one_line("differ by nan"):
        compare_forward_pass("row", ForwardPass(torch.float32, 2), peer, 1, toy=True)


def test_both_sides_of_training_begin_with_the_same_weights(tmp_path: Path) -> None:
    from modeling_vitcls import ViTCLSForImageClassification

    run = replace(DIGITS, size=TOY)
    names = ["a", "b", "c"]
    assert prepare_models(run, names, tmp_path, "row") < 1e-5
    ours = ViTCLSForImageClassification.from_pretrained(tmp_path / "our_model")
    assert ours.config.id2label == dict(enumerate(names))
    assert ours.config.hidden_size == TOY.hidden_size


def test_the_better_peer_is_the_one_with_the_lower_ratio() -> None:
    found = [
        Comparison("work", "row", peer, [6.0] * 3, [theirs] * 3, 0.0, {}) for peer, theirs in (("a", 3.0), ("b", 4.0))
    ]
    alone = Comparison("work", "other", "a", [1.0], [1.0], 0.0, {"ours_peak_bytes": 90, "theirs_peak_bytes": 100})
    assert better_peers([*found, alone]) == {("work", "row"): 1.5}
    lines = markdown([*found, alone]).splitlines()
    assert lines[0] == "| work | images/s | times as fast (quartiles) | peak memory, part of theirs |"
    assert lines[2] == "| work: row | 6.0 | a 2.00 (2.00 to 2.00), b 1.50 (1.50 to 1.50) |  |"
    assert lines[3] == "| work: other | 1.0 | a 1.00 (1.00 to 1.00) | a 0.90 |"
    assert "Medians of 1 to 3 pairs" in lines[5]
    lines = markdown(found).splitlines()
    assert lines[:2] == ["| work | images/s | times as fast (quartiles) |", "|---|---|---|"]
    assert lines[2] == "| work: row | 6.0 | a 2.00 (2.00 to 2.00), b 1.50 (1.50 to 1.50) |"


def test_photographs_are_a_folder_per_label(tmp_path: Path) -> None:
    folder = write_photographs(tmp_path / "photographs", per_class=2)
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*.jpg")) == [
        "china/000.jpg",
        "china/001.jpg",
        "flower/000.jpg",
        "flower/001.jpg",
    ]


def test_a_run_that_ends_is_reported_with_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('first'); raise SystemExit('no such model')"]
    with raises_one_line("failed: no such model"), Contestant(command, tmp_path / "lines", DIGITS):
        pass


def test_a_contestant_runs_in_its_turns_alone(tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    loop = "import sys, time\nwhile True:\n print('x', file=open(sys.argv[1], 'a')); time.sleep(0.01)"
    with Contestant([sys.executable, "-c", loop, str(lines)], lines, DIGITS) as contestant:
        before = contestant.num_lines()
        subprocess.run(["sleep", "0.2"], check=True)
        assert contestant.num_lines() - before <= 1  # suspended
        assert contestant.turn() > 0
        assert contestant.num_lines() >= before + 1 + DIGITS.lines_per_turn
    assert contestant.process.poll() is not None


def test_ratios_are_of_pairs() -> None:
    order: list[str] = []

    def side(name: str, values: list[float]) -> Any:
        def measure() -> float:
            order.append(name)
            return values.pop(0)

        return measure

    ours, theirs = in_turns(side("ours", [2.0, 9.0, 8.0]), side("theirs", [1.0, 3.0, 2.0]), 3)
    assert order == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    found = Comparison("work", "row", "them", ours, theirs, 0.0, {}).as_dict()
    assert found["ratios"] == [2.0, 3.0, 4.0] and found["ratio"] == 3.0 and found["quartiles"] == [2.5, 3.5]
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_rows_are_chosen_by_name() -> None:
    assert list(chosen(TRAINING_RUNS, ())) == list(TRAINING_RUNS)
    assert list(chosen(TRAINING_RUNS, ("digits, fp32",))) == ["digits, fp32"]
    assert SMALL.intermediate_size == 1536
    with raises_one_line("--rows", "'digits'", "'digits, fp32'"):
        chosen(TRAINING_RUNS, ("digits",))
