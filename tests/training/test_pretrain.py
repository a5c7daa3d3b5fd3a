"""Masked image modeling: masks, evaluation on held-out images, and the saved encoder."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers.tiny_models import build_tiny_config, raises_one_line
from helpers.tiny_options import TINY as TINY_FINETUNING
from helpers.tiny_options import build_tiny_options, prepare_task, read_metrics, run_dry, run_to_folder, run_training
from transformers import AutoModel, AutoModelForMaskedImageModeling

from modeling_vitcls import ViTCLSForMaskedImageModeling, ViTCLSImageProcessor, ViTCLSModel
from modeling_vitcls.data.augmentation import MaskGenerator
from modeling_vitcls.data.batches import Normalizer
from modeling_vitcls.data.sampling import derive_seed
from modeling_vitcls.data.splits import load_training_data
from modeling_vitcls.files import read_json
from modeling_vitcls.heads_vitcls import compute_masked_pixel_loss
from modeling_vitcls.inference.evaluator import ReconstructionEvaluator
from modeling_vitcls.options import DataOptions, MaskingOptions, ModelOptions, PretrainOptions
from modeling_vitcls.training.loop import get_score
from modeling_vitcls.training.losses import MaskedImageModelingObjective
from modeling_vitcls.training.pretrain import build_pretraining_model


pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("fresh_accelerate")]

CPU = torch.device("cpu")
NUM_HELD_OUT_DIGITS = 359
NUM_EVALUATED = 30
DIGITS = DataOptions(dataset="digits", num_workers=0)
TINY = replace(TINY_FINETUNING, patch_size=8, num_cls_tokens=2, num_distillation_tokens=1)


def tiny_options(folder: Path, **training: Any) -> PretrainOptions:
    """Return options of three epochs of three steps on digits, with an evaluation after each epoch."""
    flags = {"max_steps": 9, "batch_size": 480, "learning_rate": 3e-3, "ema_decay": 0.9} | training
    return build_tiny_options(folder, "digits", PretrainOptions, **vars(TINY) | flags)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output folder of a short run."""
    return run_to_folder(tiny_options(tmp_path_factory.mktemp("pretrained") / "encoder"))


# Masks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(5, 5), (5, 7), (14, 14)])
@pytest.mark.parametrize("block", [1, 2, 3])
@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_each_image_has_the_exact_fraction_masked(grid: tuple[int, int], block: int, ratio: float) -> None:
    masks = MaskGenerator(MaskingOptions(mask_ratio=ratio, mask_block=block), grid)(50, CPU)
    assert masks.shape == (50, grid[0] * grid[1]) and masks.dtype == torch.bool
    assert masks.sum(dim=1).unique().tolist() == [round(ratio * grid[0] * grid[1])]
    assert len(masks.unique(dim=0)) > 5


def test_squares_are_masked_as_a_whole() -> None:
    masks = MaskGenerator(MaskingOptions(mask_ratio=0.5, mask_block=2), (6, 8))(20, CPU)
    squares = masks.view(20, 3, 2, 4, 2).sum(dim=(2, 4))  # [20, squares down, squares across]
    assert squares.unique().tolist() == [0, 4]


def test_every_patch_is_masked_equally_often() -> None:
    torch.manual_seed(0)
    for block in (1, 2):
        masks = MaskGenerator(MaskingOptions(mask_ratio=0.5, mask_block=block), (4, 4))(4000, CPU)
        assert masks.float().mean(dim=0).sub(0.5).abs().max() < 0.04  # five standard deviations


def test_masks_follow_torchs_seed() -> None:
    choose = MaskGenerator(MaskingOptions(), (4, 4))
    torch.manual_seed(3)
    first = choose(8, CPU)
    assert not torch.equal(choose(8, CPU), first)
    torch.manual_seed(3)
    assert torch.equal(choose(8, CPU), first)


def test_invalid_masks_are_errors() -> None:
    with raises_one_line("--mask-ratio", "0.01 masks 0 of the 4 x 4 patches"):
        MaskGenerator(MaskingOptions(mask_ratio=0.01), (4, 4))
    with raises_one_line("--mask-ratio", "0.99 masks 16 of the 4 x 4 patches"):
        MaskGenerator(MaskingOptions(mask_ratio=0.99), (4, 4))
    with raises_one_line("--mask-block 3", "masks only 8 of the 4 x 4 patches"):
        MaskGenerator(MaskingOptions(mask_ratio=0.5, mask_block=3), (4, 4))
    # a block that is larger than the grid consists of whole rows or columns, and may be all masked patches
    for grid in ((2, 8), (8, 2)):
        masks = MaskGenerator(MaskingOptions(mask_ratio=0.5, mask_block=4), grid)(9, CPU).view(9, *grid)
        assert masks.sum(dim=(1, 2)).unique().tolist() == [8]
        assert masks.view(9, 2, 2, 4).transpose(1, 2).flatten(2).sum(2).unique().tolist() == [0, 8] or grid == (8, 2)


# Evaluation ----------------------------------------------------------------------------------------------------------


def evaluate(model: ViTCLSForMaskedImageModeling, batch_size: int, mask_seed: int = 0) -> dict[str, Any]:
    """Return the metrics of a model on the first held-out digits."""
    processor = build_pretraining_model(TINY)[1]
    evaluator = ReconstructionEvaluator(
        load_training_data(DIGITS, use_labels=False).held_out.select(range(NUM_EVALUATED)).images,
        processor,
        MaskGenerator(MaskingOptions(mask_ratio=0.5), (4, 4)),
        mask_seed,
        batch_size=batch_size,
        num_workers=0,
        accelerator=Accelerator(cpu=True),
        max_unreadable_images=0,
        warn=print,
    )
    first, second = evaluator(model), evaluator(model)
    assert first == second
    return first


def test_the_evaluation_loss_is_the_mean_over_images() -> None:
    torch.manual_seed(0)
    model, processor = build_pretraining_model(TINY)
    model.eval()
    metrics = evaluate(model, batch_size=16)
    assert metrics["num_images"] == NUM_EVALUATED
    assert evaluate(model, batch_size=7) == metrics
    assert evaluate(model, batch_size=7, mask_seed=1) != metrics

    mask_generator = MaskGenerator(MaskingOptions(mask_ratio=0.5), (4, 4))
    losses = []
    images = load_training_data(DIGITS, use_labels=False).held_out.images
    for index in range(NUM_EVALUATED):
        pixels = processor(images[index], return_tensors="pt")["pixel_values"]
        mask = mask_generator(1, CPU, torch.Generator().manual_seed(derive_seed(0, index)))
        with torch.no_grad():
            reconstruction = model(pixels, bool_masked_pos=mask).reconstruction
        losses.append(compute_masked_pixel_loss(reconstruction, pixels, mask, model.config).item())
    assert metrics["reconstruction_loss"] == pytest.approx(sum(losses) / len(losses), abs=2e-6)


def test_the_best_evaluation_has_the_lowest_loss() -> None:
    assert get_score({"num_images": 9, "reconstruction_loss": 0.5}, "reconstruction_loss") == -0.5
    assert get_score({"loss": 2.0, "accuracy": 0.5}, "accuracy") == 0.5
    assert get_score({"mean_average_precision": None}, "mean_average_precision") is None


# Runs ----------------------------------------------------------------------------------------------------------------


def test_every_parameter_gets_a_gradient() -> None:
    """Special tokens have gradients because patches attend to them.

    With several processes, a missing gradient stops the run.
    """
    torch.manual_seed(0)
    model, processor = build_pretraining_model(TINY)
    objective = MaskedImageModelingObjective(Normalizer(processor, CPU), MaskGenerator(MaskingOptions(), (4, 4)))
    objective(model, {"pixels": torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)})["loss"].backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    tokens = model.vitcls.embeddings.get_special_tokens()
    assert tokens.keys() == {"cls", "distillation", "registers"}
    assert all((token.grad[0].norm(dim=1) > 0).all() for token in tokens.values())


@pytest.mark.slow
def test_a_run_reduces_the_loss(pretrained: Path) -> None:
    losses = [record["held_out_reconstruction_loss"] for record in read_metrics(pretrained) if "epoch" in record]
    assert len(losses) == 3 and losses == sorted(losses, reverse=True)
    results = read_json(pretrained / "results.json")
    assert results["reconstruction_loss"] == losses[-1] < 0.97 * losses[0]
    assert results["num_images"] == NUM_HELD_OUT_DIGITS
    assert results["num_hidden_patches"] == 10  # 0.6 x 16
    assert all(moved > 0 for moved in results["token_movement"].values())


def test_the_best_checkpoint_has_the_lowest_loss(pretrained: Path) -> None:
    newest = read_json(pretrained / "checkpoints" / "step-00000009" / "state.json")
    assert newest["is_best"]
    results = read_json(pretrained / "results.json")
    assert results["selection_metric"] == "reconstruction_loss"
    assert newest["metadata"]["best_score"] == -results["reconstruction_loss"]


@pytest.mark.slow
def test_no_token_is_reported_as_not_training(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run_training(tiny_options(tmp_path, max_steps=2, log_every=1, report=True))
    output = capsys.readouterr().out
    assert "reconstruction loss" in output and "WARNING" not in output


@pytest.mark.slow
def test_a_resumed_run_masks_the_same_patches(pretrained: Path, tmp_path: Path) -> None:
    """Resume the checkpoint after six of the nine steps, as if the run had been killed then."""
    folder = tmp_path / "resumed"
    shutil.copytree(pretrained, folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000009")
    (folder / "results.json").unlink()
    (folder / "model.safetensors").unlink()
    assert (
        run_training(tiny_options(folder, resume=True))["reconstruction_loss"]
        == read_json(pretrained / "results.json")["reconstruction_loss"]
    )
    resumed, whole = (ViTCLSForMaskedImageModeling.from_pretrained(at).state_dict() for at in (folder, pretrained))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_dry_run_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    run_dry(tiny_options(folder, batch_size=8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flag", "changes"),
    [
        ("--mixup", {"mixup": 0.2}),
        ("--cutmix", {"cutmix": 1.0}),
        ("--class-balance", {"class_balance": "weights"}),
        ("--trainable", {"trainable": "last-1"}),
        ("--eval-benchmark", {"eval_benchmark": "org/benchmark", "eval_task_id": "top_1"}),
    ],
)
def test_flags_for_fine_tuning_are_errors(flag: str, changes: dict[str, Any], tmp_path: Path) -> None:
    with raises_one_line(f"{flag} is supported only in fine-tuning"):
        run_training(tiny_options(tmp_path / "never", **changes))
    assert not (tmp_path / "never").exists()


def test_dropping_patches_is_an_error(tmp_path: Path) -> None:
    with raises_one_line("Remove --patch-drop-rate"):
        run_training(tiny_options(tmp_path / "never", patch_drop_rate=0.5))
    assert not (tmp_path / "never").exists()


def test_pre_training_on_all_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {"held_out_fraction": 0.0, "max_steps": 1, "batch_size": 8}
    results = run_training(tiny_options(tmp_path, **flags))
    output = capsys.readouterr().out
    assert "not evaluated, because --held-out-fraction is 0" in output
    assert "masks     10 of 4 x 4 patches are masked, in squares of 1 x 1 patches" in output
    assert (results["num_training_images"], results["num_images"]) == (1797, 0)
    assert "reconstruction_loss" not in results and results["num_hidden_patches"] == 10


# The output folder ---------------------------------------------------------------------------------------------------


def test_the_folder_loads_as_an_encoder(pretrained: Path) -> None:
    trained = ViTCLSForMaskedImageModeling.from_pretrained(pretrained)
    encoder, info = AutoModel.from_pretrained(pretrained, output_loading_info=True)
    assert isinstance(encoder, ViTCLSModel) and not info["missing_keys"]
    weights = encoder.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in trained.vitcls.state_dict().items())
    assert isinstance(AutoModelForMaskedImageModeling.from_pretrained(pretrained), ViTCLSForMaskedImageModeling)


def test_pre_training_starts_from_a_checkpoint(pretrained: Path) -> None:
    trained = ViTCLSForMaskedImageModeling.from_pretrained(pretrained)
    model, processor = build_pretraining_model(ModelOptions(model=str(pretrained), image_size=48))
    assert torch.equal(model.decoder.projection.weight, trained.decoder.projection.weight)
    assert (processor.size.height, model.config.grid_size) == (48, (6, 6))


def test_a_checkpoint_in_bfloat16_is_trained_in_float32(tmp_path: Path) -> None:
    ViTCLSModel(build_tiny_config()).bfloat16().save_pretrained(tmp_path)
    ViTCLSImageProcessor(size=48).save_pretrained(tmp_path)
    model, processor = build_pretraining_model(ModelOptions(model=str(tmp_path)))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (processor.size.height, processor.size.width) == (32, 32)


def test_the_checkpoint_and_the_flags_determine_the_masks(tmp_path: Path) -> None:
    start = tmp_path / "start"
    ViTCLSForMaskedImageModeling(build_tiny_config(image_size=[32, 48])).save_pretrained(start)
    saved = ViTCLSImageProcessor(size={"height": 32, "width": 48}, image_mean=[0.1, 0.2, 0.3])
    saved.save_pretrained(start)
    flags = {"model": start, "max_steps": 1, "batch_size": 8, "split_seed": 3, "seed": 5, "mask_ratio": 0.5}
    run = prepare_task(build_tiny_options(tmp_path / "run", "digits", PretrainOptions, **flags))
    task, generate_mask = run.task, run.task.objective.mask_generator
    assert generate_mask.grid_size == (4, 6) and generate_mask.num_masked == 12
    expected = saved.to_dict()
    assert {name: task.processor.to_dict()[name] for name in expected} == expected
    generator = torch.Generator().manual_seed(derive_seed(3, 7))
    mask = task.build_evaluator(run.data.held_out).build_mask(7)
    assert torch.equal(mask, generate_mask(1, CPU, generator)[0])


def test_a_checkpoint_that_drops_patches_is_an_error(tmp_path: Path) -> None:
    saved, folder = ViTCLSModel(build_tiny_config(patch_drop_rate=0.5)), str(tmp_path)
    saved.save_pretrained(folder)
    ViTCLSImageProcessor(size=32).save_pretrained(folder)
    with raises_one_line(folder, "--patch-drop-rate 0"):
        build_pretraining_model(ModelOptions(model=folder))
    model, _ = build_pretraining_model(ModelOptions(model=folder, patch_drop_rate=0.0))
    assert torch.equal(model.vitcls.layers[0].mlp.fc1.weight, saved.layers[0].mlp.fc1.weight)


def test_fine_tuning_starts_from_the_encoder(pretrained: Path, tmp_path: Path) -> None:
    flags = {"model": pretrained, "max_steps": 2, "batch_size": 32, "learning_rate": 1e-3}
    options = build_tiny_options(tmp_path / "classifier", "digits", **flags)
    trained = ViTCLSForMaskedImageModeling.from_pretrained(pretrained).vitcls.state_dict()
    encoder = prepare_task(options).task.model.vitcls.state_dict()
    for name, weight in trained.items():
        assert torch.equal(encoder[name], weight), name
    results = run_training(options)
    assert results["num_images"] == NUM_HELD_OUT_DIGITS
    assert results["token_layout"]["cls"] == 2
