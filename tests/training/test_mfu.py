"""FLOPs and model FLOPs utilization (MFU) of training.

FLOPs must equal torch's count of a forward and a backward pass exactly.
"""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import Accelerator, DistributedType
from helpers.accelerate_state import reset_accelerate
from helpers.tiny_models import TASKS, build_images, build_tiny_config, randomize
from helpers.tiny_options import build_tiny_options, read_metrics
from helpers.warm_processes import READY, SECONDS, find_free_port, get_rank_variables
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

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
    build_utilization,
    count_training_flops,
    estimate_memory_without_weights,
    format_si,
)
from modeling_vitcls.training.model import set_train_mode, set_trainable_parameters
from modeling_vitcls.training.task import run_task


pytestmark = pytest.mark.usefixtures("fresh_accelerate")

BATCH = 3
TOKENS = {"num_cls_tokens": 2, "num_distillation_tokens": 1, "num_register_tokens": 3}
# Fields of the configuration that change the matrix products or the required gradients.
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


# FLOPs ---------------------------------------------------------------------------------------------------------------


def count_flops(loss: Callable[[], torch.Tensor], computes_twice: bool = False) -> int:
    """Return the FLOPs that torch counts in a forward and a backward pass, without recomputation unless requested."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        if computes_twice:
            loss().backward()
        else:
            with torch.autograd.graph.disable_saved_tensors_hooks("nothing is computed a second time"):
                loss().backward()
    return counter.get_total_flops()


def compute_loss(model: Any, labels: Any = None) -> torch.Tensor:
    return model(build_images(BATCH), labels=torch.arange(BATCH) % 3 if labels is None else labels).loss


def build_classifier(trainable: str = "full", **fields: Any) -> Any:
    model = randomize(ViTCLSForImageClassification(build_tiny_config(**fields)))
    model.set_attn_implementation("eager")
    set_trainable_parameters(model, trainable)
    set_train_mode(model)
    return model


@pytest.mark.parametrize("trainable", ["full", "head", "last-1", "last-2", "lora"])
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_training_flops_equal_those_of_torch(fields: dict[str, Any], trainable: str) -> None:
    model = build_classifier(trainable, **fields)
    expected = count_flops(lambda: compute_loss(model))
    if trainable == "lora" and not model.config.token_layout.num_prefix_tokens:  # nothing is trained below these
        assert expected < count_training_flops(model, BATCH) < 1.1 * expected
    else:
        assert count_training_flops(model, BATCH) == expected


def test_flops_equal_a_manual_count() -> None:
    """16 patches, a CLS token, width 16, two layers with MLPs of width 24; the last layer only for the CLS token."""
    patches = 16 * 8 * 8 * 3 * 16
    first = 17 * (4 * 16 * 16 + 2 * 16 * 24) + 2 * 17 * 17 * 16
    last = 17 * 2 * 16 * 16 + (2 * 16 * 16 + 2 * 16 * 24) + 2 * 17 * 16
    head = 16 * 3
    assert count_training_flops(build_classifier()) == 2 * (2 * patches + 3 * (first + last + head))
    assert count_training_flops(build_classifier("last-1")) == 2 * (patches + first + 3 * (last + head))
    assert count_training_flops(build_classifier("head")) == 2 * (patches + first + last + 2 * head)
    assert count_training_flops(build_classifier(), 5) == 5 * count_training_flops(build_classifier())


def test_flops_of_several_tasks() -> None:
    model: Any = randomize(ViTCLSForMultiTaskClassification(build_tiny_config(num_cls_tokens=2, tasks=TASKS)))
    labels = {task: torch.zeros(BATCH, dtype=torch.long) for task in TASKS}
    assert count_training_flops(model, BATCH) == count_flops(lambda: compute_loss(model, labels))
    set_trainable_parameters(model, "head")
    model.zero_grad()
    assert count_training_flops(model, BATCH) == count_flops(lambda: compute_loss(model, labels))


def test_flops_of_masked_images() -> None:
    model: Any = randomize(ViTCLSForMaskedImageModeling(build_tiny_config())).train()
    mask = torch.arange(BATCH * 16).view(BATCH, 16) % 3 == 0
    assert count_training_flops(model, BATCH) == count_flops(
        lambda: model(build_images(BATCH), bool_masked_pos=mask).loss
    )


def test_flops_of_attention_pooling() -> None:
    assert count_training_flops(pooled := build_classifier(pooling="attention"), BATCH) == count_flops(
        lambda: compute_loss(pooled)
    )
    probed = build_classifier("head", pooling="attention")
    of_what_is_read = BATCH * 2 * 2 * 16 * 16 * 16  # keys and values of 16 patches
    assert count_training_flops(probed, BATCH) == count_flops(lambda: compute_loss(probed)) + of_what_is_read


def test_recomputation_is_not_counted() -> None:
    model = build_classifier()
    once = count_training_flops(model, BATCH)
    model.gradient_checkpointing_enable()
    assert count_training_flops(model, BATCH) == once < count_flops(lambda: compute_loss(model), computes_twice=True)


# Utilization of a run ------------------------------------------------------------------------------------------------


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


def test_utilization_is_resumed_on_another_machine() -> None:
    before = Utilization(flops_per_image=1e9, peak=1e10)
    before.update(num_images=50, seconds=10.0)  # half of the peak
    after = Utilization(flops_per_image=1e9, peak=4e10)
    after.load_state(json.loads(json.dumps(before.get_state())))
    after.update(num_images=50, seconds=10.0)  # an eighth of the peak
    assert (after.executed_flops, after.available_flops) == (1e11, 5e11)
    old = Utilization(flops_per_image=1e9, peak=1e10)
    old.load_state({})
    assert old.update(num_images=1, seconds=1.0) == {"utilisation": 0.1}


def test_utilization_above_100_percent_is_unknown() -> None:
    """The peak was measured while another program ran, and training is faster after that program has ended."""
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
    assert found.update(num_images=20, seconds=1.0) == {"utilisation": 0.5} and later == [1e10]  # measured again: 4e10
    assert found.available_flops == 2e11 + 10 * 4e10  # also for earlier steps
    assert found.update(num_images=800, seconds=40.0) == {"utilisation": 0.5} and not later  # 20 s at the new peak
    assert found.peak == 4e10


def test_the_intervals_between_measurements_become_longer() -> None:
    measured: list[float] = []

    def measure() -> float:
        measured.append(found.seconds)
        return 1e10

    found = Utilization(flops_per_image=1e9, peak=1e10, measure=measure)
    for _ in range(100):
        found.update(num_images=10, seconds=1.0)  # at the peak
    assert measured == [10, 30, 60, 100]


def test_the_fastest_measurement_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    durations, now = [9.0, 0.5, 0.1, 0.4, 0.4], [0.0]  # the first call warms up

    def work() -> torch.Tensor:
        now[0] += durations.pop(0)
        return torch.zeros(())

    monkeypatch.setattr(system.time, "perf_counter", lambda: now[0])
    assert system.measure_fastest_call(work, torch.device("cpu")) == pytest.approx(0.1)


def test_measuring_draws_no_random_numbers(fast_peaks: list[float]) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    mfu.measure_gemm_peak(torch.device("cpu"), torch.float32)
    assert torch.equal(torch.get_rng_state(), before) and len(fast_peaks) == 1


def test_without_a_peak_there_is_no_utilization() -> None:
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


def build_plan(**changes: Any) -> BatchPlan:
    return BatchPlan.from_options(
        100, TrainingOptions(**{"max_steps": 3, "batch_size": 64} | changes), num_processes=1
    )


def get_utilization(model: Any, plan: BatchPlan) -> tuple[Utilization, dict[str, str]]:
    lines: dict[str, str] = {}
    return build_utilization(model, plan, Accelerator(cpu=True), lines.__setitem__), lines


def test_a_short_run_does_not_measure_the_peak() -> None:
    model = build_classifier()
    plan = build_plan(batch_size=5, gradient_accumulation_steps=4)
    found, lines = get_utilization(model, plan)
    assert found.peak is None and found.flops_per_image == count_training_flops(model)
    assert lines.keys() == {"costs"}
    assert lines["costs"].startswith(f"{format_si(20 * count_training_flops(model))}FLOP per step, and about")


def test_memory_equals_the_estimate_of_the_model() -> None:
    model = build_classifier(image_size=256)
    estimate = estimate_memory(model, batch_size=5)
    _, lines = get_utilization(model, build_plan(batch_size=5))
    assert f" {(estimate.total - estimate.parameters) / 2**20:.0f} MiB in addition to the weights" in lines["costs"]


def test_memory_is_estimated_for_the_training_device() -> None:
    """The model is still on the CPU, which would save less memory."""
    model, accelerator = build_classifier(), Accelerator(cpu=True)
    here = estimate_memory_without_weights(model, build_plan(), accelerator)
    accelerator.state.device = torch.device("cuda")
    of_mlps = 64 * (17 + 1) * 24 * 4  # bytes after the activations of both layers; the last layer computes one token
    assert estimate_memory_without_weights(model, build_plan(batch_size=64), accelerator) == here + of_mlps


def test_memory_is_estimated_for_the_precision_and_the_shards() -> None:
    model, plan = build_classifier(), replace(build_plan(), num_processes=4)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    estimate = estimate_memory(model, batch_size=64, autocast=torch.bfloat16)
    whole = estimate.total - estimate.parameters
    assert estimate_memory_without_weights(model, plan, accelerator) == whole
    accelerator.state.distributed_type = DistributedType.FSDP
    sharded = estimate.activations + (estimate.gradients + estimate.optimizer) // 4
    assert estimate_memory_without_weights(model, plan, accelerator) == sharded < whole


def test_only_long_runs_measure_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The FLOPs of the whole run decide."""
    model, plan = build_classifier(), build_plan(batch_size=5, gradient_accumulation_steps=4)
    monkeypatch.setattr(mfu, "measure_gemm_peak", lambda device, dtype: 1e9)
    run_flops = 3 * 20 * count_training_flops(model)
    for min_flops, peak in ((run_flops, 1e9), (run_flops + 1, None)):
        monkeypatch.setattr(mfu, "MIN_FLOPS", min_flops)
        found, lines = get_utilization(model, plan)
        assert found.peak == peak and ("peak" in lines) is (peak is not None)
    monkeypatch.setattr(mfu, "MIN_FLOPS", 0)
    assert get_utilization(model, plan)[1]["peak"] == "1 GFLOP/s in float32 matrix products (measured)"


def test_a_device_without_memory_for_the_measurement_has_no_utilization(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device, dtype: torch.dtype) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(mfu, "MIN_FLOPS", 0)
    monkeypatch.setattr(mfu, "measure_gemm_peak", fail)
    found, _ = get_utilization(build_classifier(), build_plan())
    assert found.update(num_images=64, seconds=1.0) == {"utilisation": None}
    assert found.get_results() is None


def test_frozen_layers_compute_all_patches() -> None:
    whole, half = (build_classifier("last-1", patch_drop_rate=rate) for rate in (0, 0.5))
    assert count_training_flops(half) == count_training_flops(whole)
    assert estimate_memory(half) == estimate_memory(whole)
    assert count_training_flops(build_classifier(patch_drop_rate=0.5)) < count_training_flops(build_classifier())


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fast_peaks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let all runs measure their peak quickly; return the list of measured peaks."""
    return measure_soon(monkeypatch)


def measure_soon(patch: pytest.MonkeyPatch) -> list[float]:
    measured: list[float] = []

    def measure(device: Any, dtype: torch.dtype) -> float:
        measured.append(system.measure_gemm_peak(device, dtype))
        return measured[-1]

    patch.setattr(system, "MIN_GEMM_SECONDS", 0.0)
    patch.setattr(mfu, "MIN_FLOPS", 0.0)
    patch.setattr(mfu, "measure_gemm_peak", measure)
    return measured


def run(folder: Path, **flags: Any) -> dict[str, Any]:
    """Return the results of a run on digits."""
    reset_accelerate()
    settings = {"max_steps": STEPS, "batch_size": SIZE, "log_every": 1, "health_every": 0, "save_every": 2} | flags
    return run_task(FinetuneTask(build_tiny_options(folder, "digits", **settings)))


class Ran(NamedTuple):
    """Results and folder of a run that measured its peak."""

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


def test_a_run_logs_its_utilization(ran: Ran) -> None:
    found = ran.results["utilisation"]
    flops = count_training_flops(ViTCLSForImageClassification.from_pretrained(ran.folder).train())
    assert found["gemm_peak_flops_per_second"] == pytest.approx(ran.peak, rel=1e-3)
    assert (found["training_flops_per_image"], found["gemm_dtype"]) == (flops, "float32")
    shares = []
    for record in read_metrics(ran.folder):
        shares.append(record["utilisation"])
        assert shares[-1] == pytest.approx(record["images_per_second"] * flops / ran.peak, rel=1e-3, abs=1e-4)
    assert min(shares) - 1e-4 <= found["of_training_steps"] <= max(shares) + 1e-4


def test_a_run_prints_its_utilization(ran: Ran) -> None:
    names = [line.split()[0] for line in ran.lines]
    assert names[names.index("device") + 1 :][:3] == ["costs", "peak", "step"]
    first, share = read_metrics(ran.folder)[0], ran.results["utilisation"]["of_training_steps"]
    (line,) = [line for line in ran.lines if line.startswith("step 1/")]
    assert f"lr {first['learning_rate']:.1e}  {first['images_per_second']:.0f} images/s" in line
    assert f" images/s, {first['utilisation']:.1%} of peak  " in line and line.endswith(" s left")
    card = (ran.folder / "README.md").read_text(encoding="utf-8")
    assert f"The model FLOPs utilization of the training steps was {share:.1%}" in card


def test_a_disturbed_measurement_gives_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The machine is busy during the first measurement. After the first step, the peak is measured again."""
    found = iter([1e3, 1e3, 1e15])
    monkeypatch.setattr(mfu, "MIN_FLOPS", 0.0)
    monkeypatch.setattr(mfu, "measure_gemm_peak", lambda device, dtype: next(found, 1e15))
    results = run(tmp_path)
    shares = [record["utilisation"] for record in read_metrics(tmp_path)]
    assert shares[0] is None and all(0 <= share <= 1 for share in shares[1:]) and len(shares) == STEPS
    assert 0 <= results["utilisation"]["of_training_steps"] <= 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 1/")]
    assert "images/s, utilization unknown  " in line

    monkeypatch.setattr(mfu, "measure_gemm_peak", lambda device, dtype: 1e3)
    assert run(tmp_path / "again")["utilisation"]["of_training_steps"] is None
    assert "utilization is unknown" in (tmp_path / "again" / "README.md").read_text(encoding="utf-8")


def test_measuring_does_not_change_training(ran: Ran, tmp_path: Path) -> None:
    """A run as short as this one does not measure."""
    assert run(tmp_path)["utilisation"] is None
    assert not any("utilisation" in record for record in read_metrics(tmp_path))
    assert [record["loss"] for record in read_metrics(tmp_path)] == [
        record["loss"] for record in read_metrics(ran.folder)
    ]
    assert "matrix products" not in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_resumed_run_includes_earlier_steps(ran: Ran, tmp_path: Path, fast_peaks: list[float]) -> None:
    last = tmp_path / "run" / "checkpoints" / f"step-{STEPS:08}"
    shutil.copytree(ran.folder, tmp_path / "run")
    shutil.rmtree(last)
    (tmp_path / "run" / "results.json").unlink()
    results = run(tmp_path / "run", resume=True)
    assert len(fast_peaks) == 1
    facts = json.loads((last / "state.json").read_text(encoding="utf-8"))["facts"]["utilisation"]
    assert facts["done"] == STEPS * SIZE * ran.results["utilisation"]["training_flops_per_image"]
    assert results["utilisation"]["of_training_steps"] == pytest.approx(facts["done"] / facts["possible"], abs=1e-4)


def test_heads_on_cached_features_have_no_utilization(
    ran: Ran, tmp_path: Path, fast_peaks: list[float], capsys: pytest.CaptureFixture
) -> None:
    results = run(tmp_path, model=ran.folder, trainable="head")
    assert results["utilisation"] is None and not fast_peaks
    output = capsys.readouterr().out
    assert "encoding 1,425 images once" in output and "FLOP" not in output


def run_process(rank: int, port: int, queue: Any) -> None:
    """Run the start of a run on two processes."""
    os.environ.update(get_rank_variables(rank, 2, port))
    torch.set_num_threads(1)
    plan = BatchPlan.from_options(100, TrainingOptions(max_steps=3, batch_size=5), num_processes=2)
    with pytest.MonkeyPatch.context() as patch:
        fast_peaks = measure_soon(patch)
        found, lines = get_utilization(build_classifier(), plan)
    queue.put((fast_peaks[0], found.peak, found.flops_per_image, lines["costs"]))


@pytest.mark.slow
def test_processes_share_the_peak() -> None:
    """All processes measure at the same time; the peak of the run is the sum."""
    port, queue = find_free_port(), READY.SimpleQueue()
    processes = [READY.Process(target=run_process, args=(rank, port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    assert [process.exitcode for process in processes] == [0, 0]
    (first, total, per_image, line), (second, same_total, *_) = queue.get(), queue.get()
    assert total == same_total == pytest.approx(first + second)
    flops = count_training_flops(build_classifier())
    assert per_image == flops
    assert (
        line.startswith(f"{format_si(10 * flops)}FLOP per step, and about") and "MiB per process in addition" in line
    )
