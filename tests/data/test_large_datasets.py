"""The start of a run with many images, in several processes and from shards."""

import io
import tarfile
from pathlib import Path

import pytest
from helpers.photo_folders import write_photos

from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.data.splits import load_training_data


@pytest.mark.parametrize("is_folder", [True, False])
def test_web_dataset_shards_need_no_flags(is_folder: bool, tmp_path: Path) -> None:
    photos = sorted(write_photos(tmp_path / "photos", range(20)).glob("*/*.png"))
    (tmp_path / "shards").mkdir()
    shard = tmp_path / "shards" / "train-0000.tar"
    with tarfile.open(shard, "w") as tar:
        for index, photo in enumerate(photos):
            for suffix, content in (
                ("png", photo.read_bytes()),
                ("cls", str(7 * (index % 3)).encode()),
            ):
                member = tarfile.TarInfo(f"{index:04}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    data = load_training_data(DataOptions(dataset=str(shard.parent if is_folder else shard)))
    assert data.label_space.columns == {"cls": ["0", "7", "14"]}
    names = data.train.images.get_names()
    assert [int(Path(name).stem) % 3 for name in names] == data.train.labels
    assert len(data.train) + len(data.held_out) == 40
