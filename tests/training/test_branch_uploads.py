"""Model folders that are pushed to a branch during training. tests/integration/test_publish_runs.py pushes them."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from accelerate import Accelerator
from helpers.tiny_models import build_tiny_config
from helpers.tiny_options import build_tiny_options
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor
from modeling_vitcls.training.branch_uploads import build_branch_uploader
from modeling_vitcls.training.reporter import Reporter
from modeling_vitcls.training.task import write_model


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_the_files_and_the_card_of_a_checkpoint(tmp_path: Path) -> None:
    """The licenses of the initial model and of the teacher are stated."""
    start, teacher, folder = tmp_path / "start", tmp_path / "teacher", tmp_path / "run"
    for path, license in ((start, "apache-2.0\nbase_model: acme/model"), (teacher, "cc-by-nc-4.0"), (folder, "mit")):
        path.mkdir()
        (path / "README.md").write_text(f"---\nlicense: {license}\n---\n")
    (start / "LICENSE").write_text("the terms")
    for name in ("metrics.jsonl", "config.resolved.yaml"):
        (folder / name).write_text(name)
    flags = {"model": str(start), "teacher": str(teacher), "num_distillation_tokens": 1, "push_to_hub": True}
    flags |= {"hub_checkpoint_every": 2, "hub_push_optimizer": True}
    options = build_tiny_options(folder, "digits", **flags)
    model = ViTCLSForImageClassification(build_tiny_config())
    reporter = Reporter(folder / "metrics.jsonl", Accelerator(cpu=True))
    write_files = partial(write_model, model, ViTCLSImageProcessor(size=32))
    uploader = build_branch_uploader(options, reporter, "ann/run", model, write_files)
    assert uploader is not None
    with uploader:
        for step in (2, 4):
            uploader.recreate_folder()
            assert list(uploader.folder.iterdir()) == []
            uploader.write_model_folder(step, model.state_dict())
        names = {path.name for path in uploader.folder.iterdir() if not path.name.endswith("_vitcls.py")}
        records = {"metrics.jsonl", "config.resolved.yaml"}
        model_files = {"config.json", "model.safetensors", "preprocessor_config.json"}
        assert names == records | model_files | {"README.md", "LICENSE"}
        assert all((uploader.folder / name).read_text() == name for name in records)
        assert (uploader.folder / "LICENSE").read_text() == "the terms"
        assert load_file(uploader.folder / "model.safetensors").keys() == model.state_dict().keys()
        card = ModelCard.load(uploader.folder / "README.md")
        assert (card.data.license, card.data.base_model) == ("apache-2.0", "acme/model")
        assert "# ann/run, step 4\n" in card.text and "--resume" in card.text
        assert "The teacher model of the distillation is licensed under cc-by-nc-4.0." in card.text
    assert not (folder / ".hub-checkpoint").exists()
    dry = replace(options, run=replace(options.run, dry_run=True))
    plain = replace(options, run=replace(options.run, hub_checkpoint_every=None))
    for changed, repo_id in ((dry, "ann/run"), (plain, "ann/run"), (options, None)):
        assert build_branch_uploader(changed, reporter, repo_id, model, write_files) is None
