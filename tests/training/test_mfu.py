"""What training is said to cost, and how much of the machine it is said to use.

Operations have to be right to the last one, against torch's own count of a forward and a backward pass.
"""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import Accelerator
from accelerate_state import reset_accelerate
from tiny_models import TASKS, build_images, build_tiny_config, randomize
from tiny_options import build_tiny_options
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from warm_processes import READY, SECONDS, find_free_port, get_rank_variables

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMaskedImageModeling,
    ViTCLSForMultiTaskClassification,
    system,
)
from modeling_vitcls.data.sampling import BatchPlan
from modeling_vitcls.options import TrainingOptions
from modeling_vitcls.training import mfu
from modeling_vitcls.training.costs import estimate_memory
from modeling_vitcls.training.finetune import FinetuneTask
from modeling_vitcls.training.mfu import (
    Utilization,
    count_training_flops,
    estimate_memory_beyond_weights,
    format_si,
    start_utilization,
)
from modeling_vitcls.training.model import apply_trainable, set_train_mode
from modeling_vitcls.training.task import run_task


pytestmark = pytest.mark.usefixtures("fresh_accelerate")

BATCH = 3
TOKENS = {"num_cls_tokens": 2, "num_distillation_tokens": 1, "num_register_tokens": 3}
# Fields of the configuration that change what is multiplied, or which gradients there are.
CASES: dict[str, dict[str, Any]] = {
    "one_cls": {},
    "tokens": TOKENS,
    "mean": {"pooling": "mean", "num_cls_tokens": 0},
    "mlp_head": {"head_type": "mlp", "head_hidden_size": 7},
    "parallel": {"layer_type": "parallel"},
    "swiglu": {"mlp_type": "swiglu"},
    "differential": {"attention_type": "differential"},
    "patch_dropout": TOKENS | {"patch_drop_rate": 0.5},
}
STEPS, SIZE = 4, 8


# Operations ----------------------------------------------------------------------------------------------------------


def counted(loss: Callable[[], torch.Tensor], computes_twice: bool = False) -> int:
    """What torch counts of a forward and a backward pass; what is computed a second time only if asked for."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        if computes_twice:
            loss().backward()
        else:
            with torch.autograd.graph.disable_saved_tensors_hooks("nothing is computed a second time"):
                loss().backward()
    return counter.get_total_flops()


def loss_of(model: Any, labels: Any = None) -> torch.Tensor:
    return model(build_images(BATCH), labels=torch.arange(BATCH) % 3 if labels is None else labels).loss


def a_classifier(trainable: str = "full", **fields: Any) -> Any:
    model = randomize(ViTCLSForImageClassification(build_tiny_config(**fields)))
    model.set_attn_implementation("eager")
    apply_trainable(model, trainable)
    set_train_mode(model)
    return model


@pytest.mark.parametrize("trainable", ["full", "head", "last-1", "last-2", "lora"])
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_operations_are_those_that_torch_counts(fields: dict[str, Any], trainable: str) -> None:
    model = a_classifier(trainable, **fields)
    expected = counted(lambda: loss_of(model))
    if trainable == "lora" and not model.config.token_layout.num_prefix_tokens:  # nothing is trained below
        assert expected < count_training_flops(model, BATCH) < 1.1 * expected
    else:
        assert count_training_flops(model, BATCH) == expected


def test_by_hand() -> None:
    """16 patches and a CLS token of width 16, in two layers with MLPs of 24, of which the last is for that token."""
    patches = 16 * 8 * 8 * 3 * 16
    first = 17 * (4 * 16 * 16 + 2 * 16 * 24) + 2 * 17 * 17 * 16
    last = 17 * 2 * 16 * 16 + (2 * 16 * 16 + 2 * 16 * 24) + 2 * 17 * 16
    head = 16 * 3
    assert count_training_flops(a_classifier()) == 2 * (2 * patches + 3 * (first + last + head))
    assert count_training_flops(a_classifier("last-1")) == 2 * (patches + first + 3 * (last + head))
    assert count_training_flops(a_classifier("head")) == 2 * (patches + first + last + 2 * head)
    assert count_training_flops(a_classifier(), 5) == 5 * count_training_flops(a_classifier())


def test_of_several_tasks() -> None:
    model: Any = randomize(ViTCLSForMultiTaskClassification(build_tiny_config(num_cls_tokens=2, tasks=TASKS)))
    labels = {task: torch.zeros(BATCH, dtype=torch.long) for task in TASKS}
    assert count_training_flops(model, BATCH) == counted(lambda: loss_of(model, labels))
    apply_trainable(model, "head")
    model.zero_grad()
    assert count_training_flops(model, BATCH) == counted(lambda: loss_of(model, labels))


def test_of_masked_images() -> None:
    model: Any = randomize(ViTCLSForMaskedImageModeling(build_tiny_config())).train()
    mask = torch.arange(BATCH * 16).view(BATCH, 16) % 3 == 0
    assert count_training_flops(model, BATCH) == counted(lambda: model(build_images(BATCH), bool_masked_pos=mask).loss)


def test_of_attention_pooling() -> None:
    assert count_training_flops(pooled := a_classifier(pooling="attention"), BATCH) == counted(lambda: loss_of(pooled))
    probed = a_classifier("head", pooling="attention")
    of_what_is_read = BATCH * 2 * 2 * 16 * 16 * 16  # for keys and values, of 16 patches
    assert count_training_flops(probed, BATCH) == counted(lambda: loss_of(probed)) + of_what_is_read


def test_what_is_computed_again_does_not_count() -> None:
    model = a_classifier()
    once = count_training_flops(model, BATCH)
    model.gradient_checkpointing_enable()
    assert count_training_flops(model, BATCH) == once < counted(lambda: loss_of(model), computes_twice=True)


# A run's share of the machine ----------------------------------------------------------------------------------------


def test_utilization_is_a_fraction_of_the_peak() -> None:
    found = Utilization(flops_per_image=2e9, peak=1e11, dtype="float32")
    assert found.get_results() is None
    assert found.update(num_images=100, seconds=4.0) == {"utilisation": 0.5}
    assert found.update(num_images=100, seconds=12.0) == {"utilisation": 0.1667}
    assert found.get_results() == {
        "of_training_steps": 0.25,  # of 16 seconds
        "training_flops_per_image": 2_000_000_000,
        "gemm_peak_flops_per_second": 1e11,
        "gemm_dtype": "float32",
    }


def test_it_goes_on_after_a_checkpoint_on_another_machine() -> None:
    before = Utilization(flops_per_image=1e9, peak=1e10)
    before.update(num_images=50, seconds=10.0)  # half of it
    after = Utilization(flops_per_image=1e9, peak=4e10)
    after.load_state(json.loads(json.dumps(before.get_state())))
    after.update(num_images=50, seconds=10.0)  # an eighth
    assert (after.executed_flops, after.available_flops) == (1e11, 5e11)
    old = Utilization(flops_per_image=1e9, peak=1e10)
    old.load_state({})
    assert old.update(num_images=1, seconds=1.0) == {"utilisation": 0.1}


def test_more_than_the_peak_is_unknown() -> None:
    """A peak that was measured while another program ran, and is not reached any more once that has ended."""
    found = Utilization(flops_per_image=1e9, peak=1e10)
    assert found.update(num_images=147, seconds=10.0) == {"utilisation": None}
    assert found.get_results() == {
        "of_training_steps": None,
        "training_flops_per_image": 1_000_000_000,
        "gemm_peak_flops_per_second": 1e10,
        "gemm_dtype": "",
    }


def test_the_largest_of_several_peaks_counts() -> None:
    later = [4e10, 1e10]
    found = Utilization(flops_per_image=1e9, peak=1e10, measure=lambda: later.pop(0))
    found.load_state({"done": 1e11, "possible": 2e11})
    assert found.update(num_images=90, seconds=9.0) == {"utilisation": 1.0} and len(later) == 2  # 9 s at the peak
    assert found.update(num_images=20, seconds=1.0) == {"utilisation": 0.5} and later == [1e10]  # measured anew: 4e10
    assert found.available_flops == 2e11 + 10 * 4e10  # of earlier steps, too
    assert found.update(num_images=800, seconds=40.0) == {"utilisation": 0.5} and not later  # 20 s at the new peak
    assert found.peak == 4e10


def test_the_fastest_turn_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    durations, now = [9.0, 0.5, 0.1, 0.4, 0.4], [0.0]  # the first call warms up

    def work() -> torch.Tensor:
        now[0] += durations.pop(0)
        return torch.zeros(())

    monkeypatch.setattr(system.time, "perf_counter", lambda: now[0])
    assert system.measure_fastest_call(work, torch.device("cpu")) == pytest.approx(0.1)


def test_measuring_draws_no_random_numbers(peaks: list[float]) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    mfu.measure_gemm_peak(torch.device("cpu"), torch.float32)
    assert torch.equal(torch.get_rng_state(), before) and len(peaks) == 1


def test_without_a_peak_nothing_is_claimed() -> None:
    unknown = Utilization(flops_per_image=1e9)
    assert unknown.update(num_images=50, seconds=10.0) == {} and unknown.get_results() is None


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0 "),
        (999.4, "999 "),
        (999.6, "1 k"),
        (1.234e9, "1.23 G"),
        (1e12, "1 T"),
        (2.5e19, "25 E"),
        (3e22, "3e+04 E"),
    ],
)
def test_numbers_format_si(value: float, shown: str) -> None:
    assert format_si(value) == shown


def a_plan(**changes: Any) -> BatchPlan:
    return BatchPlan.from_options(
        100, TrainingOptions(**{"max_steps": 3, "batch_size": 64} | changes), num_processes=1
    )


def started(model: Any, plan: BatchPlan) -> tuple[Utilization, dict[str, str]]:
    lines: dict[str, str] = {}
    return start_utilization(model, plan, Accelerator(cpu=True), lines.__setitem__), lines


def test_a_short_run_measures_nothing() -> None:
    model = a_classifier()
    plan = a_plan(batch_size=5, gradient_accumulation_steps=4)
    found, lines = started(model, plan)
    assert found.peak is None and found.flops_per_image == count_training_flops(model)
    assert lines.keys() == {"costs"}
    assert lines["costs"].startswith(f"{format_si(20 * count_training_flops(model))}FLOP per step, and about")


def test_memory_is_what_the_model_estimates() -> None:
    model = a_classifier(image_size=256)
    estimate = estimate_memory(model, batch_size=5)
    _, lines = started(model, a_plan(batch_size=5))
    assert f" {(estimate.total - estimate.parameters) / 2**20:.0f} MiB beyond the weights" in lines["costs"]


def test_memory_is_that_of_the_device_where_it_trains() -> None:
    """The model is still on the CPU, which would keep less."""
    model, accelerator = a_classifier(), Accelerator(cpu=True)
    here = estimate_memory_beyond_weights(model, a_plan(), accelerator)
    accelerator.state.device = torch.device("cuda")
    of_mlps = 64 * (17 + 1) * 24 * 4  # bytes after the activations of both layers, the last for one token
    assert estimate_memory_beyond_weights(model, a_plan(batch_size=64), accelerator) == here + of_mlps


def test_nothing_is_claimed_of_a_model_that_merges_patches(peaks: list[float]) -> None:
    """Its costs are counted as if it merged none: it would seem to use more of the machine than it does."""
    found, lines = started(a_classifier(merged_patches_per_layer=2), a_plan())
    assert found == Utilization() and lines == {} and peaks == []


def test_frozen_layers_see_whole_images() -> None:
    whole, half = (a_classifier("last-1", patch_drop_rate=rate) for rate in (0, 0.5))
    assert count_training_flops(half) == count_training_flops(whole)
    assert estimate_memory(half) == estimate_memory(whole)
    assert count_training_flops(a_classifier(patch_drop_rate=0.5)) < count_training_flops(a_classifier())


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def peaks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Any run measures its peak, in a moment; the peaks that this process measured."""
    return measure_soon(monkeypatch)


def measure_soon(patch: pytest.MonkeyPatch) -> list[float]:
    measured: list[float] = []

    def measure(device: Any, dtype: torch.dtype) -> float:
        measured.append(system.measure_gemm_peak(device, dtype))
        return measured[-1]

    patch.setattr(system, "GEMM_SECONDS", 0.0)
    patch.setattr(mfu, "MIN_FLOPS", 0.0)
    patch.setattr(mfu, "measure_gemm_peak", measure)
    return measured


def run(folder: Path, **flags: Any) -> dict[str, Any]:
    """Return the results of a run on digits."""
    reset_accelerate()
    settings = {"max_steps": STEPS, "batch_size": SIZE, "log_every": 1, "health_every": 0, "save_every": 2} | flags
    return run_task(FinetuneTask(build_tiny_options(folder, "digits", **settings)))


class Ran(NamedTuple):
    """A run that measured its peak."""

    folder: Path
    peak: float
    results: dict[str, Any]
    lines: list[str]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("ran") / "my-model"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        measured = measure_soon(patch)
        results = run(folder)
    (peak,) = measured
    return Ran(folder, peak, results, said.getvalue().splitlines())


def records_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_run_writes_what_it_uses(ran: Ran) -> None:
    found = ran.results["utilisation"]
    flops = count_training_flops(ViTCLSForImageClassification.from_pretrained(ran.folder).train())
    assert found["gemm_peak_flops_per_second"] == pytest.approx(ran.peak, rel=1e-3)
    assert (found["training_flops_per_image"], found["gemm_dtype"]) == (flops, "float32")
    shares = []
    for record in records_of(ran.folder):
        shares.append(record["utilisation"])
        assert shares[-1] == pytest.approx(record["images_per_second"] * flops / ran.peak, rel=1e-3, abs=1e-4)
    assert min(shares) - 1e-4 <= found["of_training_steps"] <= max(shares) + 1e-4


def test_a_run_says_what_it_uses(ran: Ran) -> None:
    names = [line.split()[0] for line in ran.lines]
    assert names[names.index("device") + 1 :][:3] == ["costs", "peak", "step"]
    first, share = records_of(ran.folder)[0], ran.results["utilisation"]["of_training_steps"]
    (line,) = [line for line in ran.lines if line.startswith("step 1/")]
    assert f"lr {first['learning_rate']:.1e}  {first['images_per_second']:.0f} images/s" in line
    assert f" images/s, {first['utilisation']:.1%} of peak  " in line and line.endswith(" s left")
    card = (ran.folder / "README.md").read_text(encoding="utf-8")
    assert f"The model FLOPs utilization of the training steps was {share:.1%}" in card


def test_a_disturbed_measurement_gives_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The first measurement finds the machine busy; after the first step it is measured again."""
    found = iter([1e3, 1e3, 1e15])
    monkeypatch.setattr(mfu, "MIN_FLOPS", 0.0)
    monkeypatch.setattr(mfu, "measure_gemm_peak", lambda device, dtype: next(found, 1e15))
    results = run(tmp_path)
    shares = [record["utilisation"] for record in records_of(tmp_path)]
    assert shares[0] is None and all(0 <= share <= 1 for share in shares[1:]) and len(shares) == STEPS
    assert 0 <= results["utilisation"]["of_training_steps"] <= 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 1/")]
    assert "images/s, utilization unknown  " in line

    monkeypatch.setattr(mfu, "measure_gemm_peak", lambda device, dtype: 1e3)
    assert run(tmp_path / "again")["utilisation"]["of_training_steps"] is None
    assert "utilization is unknown" in (tmp_path / "again" / "README.md").read_text(encoding="utf-8")


def test_measuring_changes_nothing(ran: Ran, tmp_path: Path) -> None:
    """And a run as short as this one is not worth it."""
    assert run(tmp_path)["utilisation"] is None
    assert not any("utilisation" in record for record in records_of(tmp_path))
    assert [record["loss"] for record in records_of(tmp_path)] == [record["loss"] for record in records_of(ran.folder)]
    assert "matrix products" not in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_resumed_run_counts_what_it_did_before(ran: Ran, tmp_path: Path, peaks: list[float]) -> None:
    last = tmp_path / "run" / "checkpoints" / f"step-{STEPS:08}"
    shutil.copytree(ran.folder, tmp_path / "run")
    shutil.rmtree(last)
    (tmp_path / "run" / "results.json").unlink()
    results = run(tmp_path / "run", resume=True)
    assert len(peaks) == 1
    facts = json.loads((last / "state.json").read_text(encoding="utf-8"))["facts"]["utilisation"]
    assert facts["done"] == STEPS * SIZE * ran.results["utilisation"]["training_flops_per_image"]
    assert results["utilisation"]["of_training_steps"] == pytest.approx(facts["done"] / facts["possible"], abs=1e-4)


def test_heads_on_cached_features_use_nothing(
    ran: Ran, tmp_path: Path, peaks: list[float], capsys: pytest.CaptureFixture
) -> None:
    results = run(tmp_path, model=ran.folder, trainable="head")
    assert results["utilisation"] is None and not peaks
    output = capsys.readouterr().out
    assert "encoding 1,425 images once" in output and "FLOP" not in output


def one_of_two(rank: int, port: int, queue: Any) -> None:
    """What a run on two processes begins with."""
    os.environ.update(get_rank_variables(rank, 2, port))
    torch.set_num_threads(1)
    plan = BatchPlan.from_options(100, TrainingOptions(max_steps=3, batch_size=5), num_processes=2)
    with pytest.MonkeyPatch.context() as patch:
        peaks = measure_soon(patch)
        found, lines = started(a_classifier(), plan)
    queue.put((peaks[0], found.peak, found.flops_per_image, lines["costs"]))


@pytest.mark.slow
def test_processes_share_the_machine() -> None:
    """Each measures what it reaches while the others do; the peak of the run is their sum."""
    port, queue = find_free_port(), READY.SimpleQueue()
    processes = [READY.Process(target=one_of_two, args=(rank, port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    assert [process.exitcode for process in processes] == [0, 0]
    (first, total, per_image, line), (second, same_total, *_) = queue.get(), queue.get()
    assert total == same_total == pytest.approx(first + second)
    flops = count_training_flops(a_classifier())
    assert per_image == flops
    assert line.startswith(f"{format_si(10 * flops)}FLOP per step, and about") and "MiB per process beyond" in line
