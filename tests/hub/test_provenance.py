"""Provenance of models: licenses are inherited without changes, and never invented."""

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.local_hub import LocalHub
from helpers.model_folders import write_results
from helpers.tiny_models import build_random
from huggingface_hub import constants
from pytest import MonkeyPatch

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.hub.provenance import Provenance, find_provenance
from modeling_vitcls.publishing.published_files import list_published_files


DINOV3 = "license: other\nlicense_name: dinov3-license\nlicense_link: LICENSE.md\n"


def write_folder(folder: Path, metadata: str, **files: str) -> Path:
    """Write a model folder with a card and further files."""
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\n{metadata}---\n\n# Model\n")
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def test_the_metadata_of_a_card_is_inherited(tmp_path: Path) -> None:
    source = write_folder(
        tmp_path / "mine", f"{DINOV3}base_model: timm/dinov3\n", LICENSE_md="the text"
    )

    found = find_provenance(str(source))
    expected = Provenance(
        "mine", "timm/dinov3", "other", "dinov3-license", "LICENSE.md", (source / "LICENSE.md",)
    )
    assert (
        found
        == expected
        == find_provenance(f"transformers:{source}")
        == find_provenance(f"timm:local-dir:{source}")
    )

    assert found.license_label == "dinov3-license"
    assert replace(found, license="mit").license_label == "mit"
    assert replace(found, license_name=None).license_label == "other"

    output = tmp_path / "out"
    output.mkdir()
    found.copy_to(output)
    assert (output / "LICENSE.md").read_text() == "the text"
    assert Provenance.from_dict(found.to_dict(), output) == replace(
        found, license_files=(output / "LICENSE.md",)
    )


def test_other_licenses_link_to_their_file_if_it_exists(tmp_path: Path) -> None:
    assert find_provenance(str(write_folder(tmp_path / "missing", DINOV3))).license_link is None
    source = write_folder(
        tmp_path / "mine", "license: other\nlicense_name: x\n", LICENSE="the text"
    )
    assert find_provenance(str(source)).license_link == "LICENSE"
    write_folder(source, "license: mit\n")
    assert find_provenance(str(source)) == Provenance(
        "mine", license="mit", license_files=(source / "LICENSE",)
    )


def test_files_that_a_license_requires_are_copied(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "mine", "license: other\nlicense_name: x\n")
    taken = ["COPYING", "LICENCE.txt", "NOTICE", "license.md"]
    for name in (*taken, "license_plates.pkl", "noticed.bin", "copying.py", "about.md"):
        (source / name).write_text(name)

    found = find_provenance(str(source))
    assert sorted(file.name for file in found.license_files) == taken
    assert found.license_link == "LICENCE.txt"

    output = tmp_path / "out"
    build_random(ViTCLSForImageClassification).save_pretrained(output)
    found.copy_to(output)
    write_results(output, {"provenance": found.to_dict()})
    (output / "license_plates.pkl").write_text("")
    published = list_published_files(ModelFolder(output))
    assert {name for name in published if "." not in name or "lic" in name.lower()} == set(taken)


@pytest.mark.parametrize(
    "card", ["", "license: unknown\n", "license: [unclosed\n", "- mit\n", "tags:\n- vit\n"]
)
def test_missing_metadata_stays_unknown(tmp_path: Path, card: str) -> None:
    assert find_provenance(str(write_folder(tmp_path / "mine", card))) == Provenance("mine")


def test_a_run_whose_card_was_deleted_keeps_its_license_and_base_model(tmp_path: Path) -> None:
    build_random(ViTCLSForImageClassification).save_pretrained(tmp_path)
    write_folder(tmp_path, f"{DINOV3}base_model: timm/dinov3\n", LICENSE_md="the text")
    known = find_provenance(str(tmp_path))
    write_results(tmp_path, {"provenance": known.to_dict()})
    (tmp_path / "README.md").unlink()
    assert find_provenance(str(tmp_path)) == known


def test_timm_weights_have_their_license() -> None:
    found = find_provenance("timm:vit_small_patch16_dinov3.lvd1689m")
    assert found.license == "other"
    assert found.license_name == "dinov3-license"
    assert found.license_link == "https://huggingface.co/timm/vit_small_patch16_dinov3.lvd1689m"
    assert found.base_model == "timm/vit_small_patch16_dinov3.lvd1689m"

    assert find_provenance("timm:vit_base_patch16_224.mae").license_metadata == {
        "license": "cc-by-nc-4.0",
        "license_name": None,
        "license_link": None,
    }

    assert find_provenance("timm:vit_tiny_patch16_224@mine.safetensors") == Provenance(
        "timm:vit_tiny_patch16_224"
    )

    assert find_provenance("timm:no_such_model") == Provenance("timm:no_such_model")
    unknown = Provenance("timm:dla60_res2net.in1k", base_model="timm/dla60_res2net.in1k")
    assert find_provenance("timm:dla60_res2net.in1k") == unknown


# The Hub ------------------------------------------------------------------------------------------


@pytest.fixture
def hub(hub: LocalHub, monkeypatch: MonkeyPatch) -> LocalHub:
    """Start a Hub with a model."""
    files = {"README.md": f"---\n{DINOV3}---\n".encode(), "config.json": b"{}"}
    hub.create("ann/dinov3", files=files | {"LICENSE.md": b"the text"})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return hub


@pytest.mark.parametrize(
    "source",
    [
        "ann/dinov3",
        "transformers:ann/dinov3@main",
        "timm:hf-hub:ann/dinov3",
        "timm:hf-hub:ann/dinov3@main",
    ],
)
def test_a_model_on_the_hub_passes_its_license_on(
    hub: LocalHub, tmp_path: Path, source: str
) -> None:
    found = find_provenance(source)
    assert found.name == "ann/dinov3"
    assert found.base_model == "ann/dinov3"
    assert found.license_name == "dinov3-license"
    assert found.license_link == "LICENSE.md"
    found.copy_to(tmp_path)
    assert (tmp_path / "LICENSE.md").read_text() == "the text"


def test_a_missing_model_has_an_unknown_license(hub: LocalHub) -> None:
    assert find_provenance("ann/nothing") == Provenance("ann/nothing", base_model="ann/nothing")
    assert find_provenance("no id at all") == Provenance("no id at all")


def test_without_a_network_the_cache_is_used(hub: LocalHub, monkeypatch: MonkeyPatch) -> None:
    known = find_provenance("ann/dinov3")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert find_provenance("ann/dinov3") == known
    assert len(hub.requests) == asked
