"""lightly-train's image classification, with as many steps as 5 epochs of 8 images."""

import os
from pathlib import Path

import lightly_train


photos = Path(os.environ["PHOTOS"])
names = sorted(folder.name for folder in (photos / "train").iterdir())
lightly_train.train_image_classification(
    out=os.environ["OUTPUT"] + "/run",
    model="dinov2/vits14-noreg",
    model_args={"backbone_weights": os.environ["TIMM_WEIGHTS"]},
    data={
        "train": str(photos / "train"),
        "val": str(photos / "test"),
        "classes": dict(enumerate(names)),
    },
    steps=5 * len(list((photos / "train").glob("*/*"))) // 8,
    batch_size=8,
    num_workers=1,
    accelerator="cpu",
    precision="32-true",
    overwrite=True,
)
model = lightly_train.load_model(os.environ["OUTPUT"] + "/run/exported_models/exported_last.pt")
files = sorted((photos / "test").glob("*/*"))
right = [names[int(model.predict(file)["labels"][0])] == file.parent.name for file in files]
print("accuracy", sum(right) / len(right))
