"""Audit of a labeled dataset: possible label errors, outliers and near duplicates.

    images -> encoder, once -> features -> out-of-fold probabilities -> cleanlab's Datalab -> page, table
           -> small copies -> near duplicates ---------------------------------------------^

    audit_checkpoint(options)        `evaluate --audit`: all of it
    audit = audit_images(images)     one row per issue
    write_audit(audit, images, ...)  audit.html with photos to check, and audit.csv with all rows

The probability of each label comes from a classifier that was not fitted to the image: that of a
run which predicted all images in this way (a frozen run), or a `LinearProbe`
of the model's features. The page saves the checked photos as a table for `finetune --exclude`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from rich.console import Console
from sklearn.neighbors import NearestNeighbors

from ..conversion.open_model import open_model
from ..data.evaluation_data import choose_evaluation_split
from ..data.images import LabeledImages
from ..data.labels import get_label_space
from ..data.sources import load_splits
from ..data.splits_table import get_keys, read_splits
from ..hub.model_files import PREDICTIONS_FILE
from ..hub.model_folder import ModelFolder
from ..inference.class_statistics import TokenFeatures
from ..inference.evaluate import MAX_BATCH_SIZE, set_up_evaluation, write_results
from ..inference.frozen_features import FeatureLayout, FrozenPass
from ..inference.linear_probe import NUM_LAST_LAYERS, LinearProbe
from ..inference.load_model import TORCH, load_for_inference
from ..inference.options import EvaluateOptions
from ..runtime.errors import describe_installation
from ..runtime.files import escape_csv_cell, write_atomically
from ..runtime.progress import report_work
from .report import encode_data_url, render_page


# of cleanlab's choices, the one with the fewest right labels (docs/evaluating.md)
LABEL_FILTER = "low_self_confidence"
NUM_NEIGHBORS = 10  # of each image, by whose distance outliers are found
NUM_COPIES = 5  # most similar images of each image that may be near duplicates
THUMBNAIL_SIZE = 32  # side of the compared images in pixels
MAX_DISTANCE = 0.1  # maximum distance of near duplicates, 1 - correlation of the pixels
# Near duplicates are at most this fraction of the distance at which images of the dataset usually
# have a neighbor. Without this limit, all images of the digit 1 would be duplicates.
MAX_RELATIVE_DISTANCE = 0.25
PHOTO_SIZE = 192  # longer side of the images on the page in pixels
MAX_SHOWN = 200  # rows of each kind of issue on the page
TOO_FEW_IMAGES = "`audit` requires two different images of each of two classes. Add images"


@dataclass(frozen=True)
class AuditedImages:
    """N readable images with the features of a model.

    Attributes:
        rows: `split`, `id` (path or index in the split) and `label` of each image.
        sources: the images that contain each image, and its index among them.
        keys: [N] checksums of the content.
        features: [N, D] of each token.
        probabilities: [N, K] of the K classes, sorted by name; NaN if the label of an image cannot
            be checked.
    """

    rows: pd.DataFrame
    sources: list[tuple[LabeledImages, int]]
    keys: np.ndarray
    features: TokenFeatures
    probabilities: np.ndarray

    @property
    def is_checked(self) -> np.ndarray:
        """Return whether the label of each image [N] can be checked."""
        return np.isfinite(self.probabilities).all(axis=1)

    @property
    def predictions(self) -> np.ndarray:
        """Return the most probable label [N] of each image, which is its own if it is unchecked."""
        names, labels = np.unique(self.rows["label"], return_inverse=True)
        return np.where(self.is_checked, names[self.probabilities.argmax(axis=1)], names[labels])

    @property
    def accuracy(self) -> float:
        """Return the fraction of the checked labels that are predicted."""
        return float((self.predictions == self.rows["label"])[self.is_checked].mean())


def audit_checkpoint(options: EvaluateOptions) -> dict[str, Any]:
    """Audit a dataset, write the page and the table, and return the number of issues of each kind.

    Raises:
        ValueError: if the dataset has several labels per image or too few images, or if the page
            or the table exists without `overwrite`.
        OSError: if the model or the dataset cannot be read, or the page cannot be written.
    """
    assert options.audit is not None
    for file in (options.audit, options.audit.with_suffix(".csv")):
        if file.exists() and not options.overwrite:
            raise ValueError(
                f"{file} exists, and may have been edited. Set `overwrite=True`, or another `audit`"
            )
    if find_spec("cleanlab") is None:
        raise ValueError(f"`audit` requires cleanlab. {describe_installation('audit')}")

    images, num_unreadable, console = load_audited_images(options)
    audit = audit_images(images)
    title = f"Audit of {Path(options.dataset).name}"
    csv_file = write_audit(audit, images, options.audit, title)
    counts = {issue: len(rows) for issue, rows in audit.items()}
    across = count_pairs_across_splits(audit)
    if across:
        console.print(
            f"WARNING: {across} pairs of near duplicates are in different splits",
            style="bold yellow",
        )
    console.print(
        f"images: {len(images.rows):,}; possible label errors: {counts['label']}, "
        f"near duplicates: {counts['duplicate']}, outliers: {counts['outlier']}"
    )
    if counts["label"]:
        console.print(
            f"the classifier that checked the labels predicts {images.accuracy:.1%} of them: the "
            "lower this number, the more of the possible label errors are right labels"
        )
    console.print(f"saved {options.audit} and {csv_file.name}", markup=False)
    results = counts | {
        "across_splits": across,
        "num_images": len(images.rows),
        "num_unreadable_images": num_unreadable,
        "accuracy": images.accuracy,
    }
    write_results(results, options.output, console)
    return results


# Features and probabilities -----------------------------------------------------------------------


def load_audited_images(options: EvaluateOptions) -> tuple[AuditedImages, int, Console]:
    """Return the audited images, the number of unreadable ones, and the main process's console."""
    files: list[Path] = []
    folder = open_model(options.model)
    if folder.results.get("split") == "cross-validation":
        files = [folder.path / PREDICTIONS_FILE]

    accelerator, console, warn = set_up_evaluation(options.mixed_precision)
    data = load_splits(options, select=partial(choose_splits, options))
    if data.label_space.kind != "single_label_classification":
        raise ValueError("`audit` requires one label per image. Set a single `label_column`")
    names = np.array(data.label_space.names)
    parts = {
        split: images.draw(options.max_images, options.split_seed)
        for split, images in data.images_by_split.items()
    }
    check_class_sizes(parts.values())
    loaded = load_for_inference(
        folder,
        replace(options, backend=TORCH),
        accelerator,
        use_head=False,
        max_batch_size=MAX_BATCH_SIZE,
        print_line=partial(console.print, markup=False),
    )
    layout = FeatureLayout.from_config(loaded.model.config, NUM_LAST_LAYERS)

    tables = []
    values = []
    keys = []
    sources: list[tuple[LabeledImages, int]] = []
    num_unreadable = 0
    for split, images in parts.items():
        image_pass = FrozenPass(
            images,
            layout,
            processor=loaded.processor,
            label_space=data.label_space,
            batch_size=loaded.batch_size,
            accelerator=accelerator,
            num_workers=options.num_workers,
            max_unreadable_images=options.max_unreadable_images,
            num_channels=loaded.config.num_channels,
            warn=warn,
        )
        features = image_pass(loaded.model, console)
        num_unreadable += image_pass.num_unreadable
        ids = np.array(images.images.get_names())[features.indices]
        tables.append(pd.DataFrame({"split": split, "id": ids, "label": names[features.labels]}))
        values.append(features.values)
        keys.append(get_keys(images)[features.indices])
        sources += [(images, index) for index in features.indices.tolist()]

    audited = AuditedImages(
        rows=pd.concat(tables, ignore_index=True),
        sources=sources,
        keys=np.concatenate(keys),
        features=layout.split(np.concatenate(values)),
        probabilities=np.zeros((len(sources), 0)),
    )
    probabilities = None
    if files and not options.frozen:
        probabilities = read_recorded_probabilities(folder, files, audited)
    if probabilities is None:
        with report_work("cross-validation", console):
            probabilities = predict_out_of_fold(audited)
    else:
        console.print("labels are checked with the predictions of the run")
    return replace(audited, probabilities=probabilities), num_unreadable, console


def choose_splits(options: EvaluateOptions, names: Sequence[str]) -> Sequence[str]:
    """Return the splits to audit: all of them, or the one of `split`."""
    if options.split is None:
        return names
    return [choose_evaluation_split(options.split, options.dataset, names)]


def check_class_sizes(parts: Iterable[LabeledImages]) -> None:
    """Raise ValueError unless two classes have two images, which a cross-validation needs."""
    sizes = Counter(label for images in parts for label in images.labels)
    if sum(size > 1 for size in sizes.values()) < 2:
        raise ValueError(TOO_FEW_IMAGES)


def read_recorded_probabilities(
    folder: ModelFolder, files: Sequence[Path], images: AuditedImages
) -> np.ndarray | None:
    """Return the probabilities [N, K] that a run recorded for images when it did not see them.

    Return None if it has not recorded all of these images and classes.
    """
    tables = [pd.read_parquet(file, columns=["image", "probabilities"]) for file in files]
    recorded = pd.concat(tables).drop_duplicates("image", keep=False).set_index("image")
    names = get_label_space(folder.config).names
    classes = np.unique(images.rows["label"])
    is_seen = images.rows["id"].isin(recorded.index) & np.isin(
        images.keys, read_splits(folder)["key"]
    )
    if images.rows["id"].duplicated().any() or not is_seen.all() or not set(classes) <= set(names):
        return None
    probabilities = np.stack(recorded.loc[images.rows["id"], "probabilities"])
    return probabilities[:, [names.index(name) for name in classes]]


def predict_out_of_fold(images: AuditedImages) -> np.ndarray:
    """Return the probabilities [N, K] of a classifier that was not fitted to the image.

    Copies of an image are left out together. The only image of a class has NaN.
    """
    probe = LinearProbe().fit(images.features, images.rows["label"].to_numpy(), groups=images.keys)
    if not probe.num_folds_:
        raise ValueError(TOO_FEW_IMAGES)
    return probe.out_of_fold_


# Issues -------------------------------------------------------------------------------------------


def audit_images(images: AuditedImages) -> dict[str, pd.DataFrame]:
    """Return a table for each kind of issue, with the most severe issue first.

    Columns: `row`, the number of the image; its `split`, `id`, `label` and `predicted` label; the
    `score` from 0 (severe) to 1, which is the probability of the label for label errors and the
    distance of near duplicates; and their `other_row`, `other_split` and `other`.
    """
    from cleanlab import Datalab

    labels = images.rows["label"].to_numpy()
    own_label = np.eye(images.probabilities.shape[1])[np.unique(labels, return_inverse=True)[1]]
    tokens = [token for token in images.features if token[0] == -1]
    lab = Datalab({"label": labels}, label_name="label", verbosity=0)
    lab.find_issues(
        pred_probs=np.where(images.is_checked[:, None], images.probabilities, own_label),
        features=np.concatenate([images.features[token] for token in tokens], axis=1),
        issue_types={
            "label": {
                "clean_learning_kwargs": {
                    "find_label_issues_kwargs": {"filter_by": LABEL_FILTER, "n_jobs": 1}
                }
            },
            "outlier": {"k": min(NUM_NEIGHBORS, len(labels) - 1)},
        },
    )
    rows = images.rows.assign(row=images.rows.index, predicted=images.predictions)
    found = {"duplicate": list_pairs(rows, *find_near_duplicates(images))}
    for issue in ("label", "outlier"):
        scores = lab.get_issues(issue).query(f"is_{issue}_issue")[f"{issue}_score"]
        scores = scores.sort_values(kind="stable")
        found[issue] = rows.loc[scores.index].assign(score=scores.round(4))
    return found


def find_near_duplicates(images: AuditedImages) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs [P, 2] of images whose pixels agree, also if one is mirrored, and distances [P].

    The features of an encoder find one copy in ten that was made smaller and saved as JPEG.
    """
    pixels = np.stack([make_thumbnail(source, index) for source, index in images.sources])
    vectors = standardize(pixels)
    num_neighbors = min(NUM_COPIES + 1, len(vectors))  # including the image itself
    search = NearestNeighbors(n_neighbors=num_neighbors, metric="cosine").fit(vectors)
    found = [search.kneighbors(queries) for queries in (vectors, standardize(pixels[:, :, ::-1]))]
    distances, neighbors = map(np.hstack, zip(*found, strict=True))  # [N, K]
    rows = np.arange(len(vectors))[:, None]
    distances = np.where(neighbors == rows, np.inf, distances)

    usual = float(np.median(distances.min(axis=1)))
    # An identical image is a duplicate even if most images of the dataset have one.
    limit = max(min(MAX_DISTANCE, MAX_RELATIVE_DISTANCE * usual), 1e-5)
    pairs = np.sort(np.stack([np.broadcast_to(rows, neighbors.shape), neighbors], axis=-1))
    is_near = distances <= limit
    order = np.argsort(distances[is_near], kind="stable")
    pairs, first = np.unique(pairs[is_near][order], axis=0, return_index=True)
    return pairs, distances[is_near][order][first]


def make_thumbnail(source: LabeledImages, index: int) -> np.ndarray:
    """Return the pixels of an image at the size for comparisons."""
    image = source.images[index].convert("RGB")
    return np.asarray(image.resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.BOX))


def standardize(pixels: np.ndarray) -> np.ndarray:
    """Return images [N, H, W, 3] as vectors [N, P] of mean 0, which are 0 if constant."""
    flat = pixels.reshape(len(pixels), -1).astype(np.float32)
    return flat - flat.mean(axis=1, keepdims=True)


def list_pairs(rows: pd.DataFrame, pairs: np.ndarray, distances: np.ndarray) -> pd.DataFrame:
    """Return the pairs of near duplicates. Those in different splits come first."""
    first, second = rows.iloc[pairs[:, 0]], rows.iloc[pairs[:, 1]]
    found = first.reset_index(drop=True).assign(
        score=distances.round(4),
        other_row=second["row"].to_numpy(),
        other_split=second["split"].to_numpy(),
        other=second["id"].to_numpy(),
    )
    is_same_split = found["split"] == found["other_split"]
    order = np.lexsort((found["score"], is_same_split))
    return found.iloc[order]


def count_pairs_across_splits(audit: dict[str, pd.DataFrame]) -> int:
    """Return the number of near duplicates whose images are in different splits."""
    return int((audit["duplicate"]["split"] != audit["duplicate"]["other_split"]).sum())


# Output -------------------------------------------------------------------------------------------


def write_audit(
    audit: dict[str, pd.DataFrame], images: AuditedImages, page: Path, title: str
) -> Path:
    """Write the page, and a CSV file with one row per issue to the same folder.

    Return the path of the file. Texts in both tables are escaped, because labels and file names may
    be formulas of a spreadsheet.
    """
    table = pd.concat(audit, names=["issue", None]).reset_index("issue")
    csv_file = page.with_suffix(".csv")
    shown = {issue: rows.head(MAX_SHOWN).to_dict("records") for issue, rows in audit.items()}
    photos = images.rows.assign(predicted=images.predictions)
    photos["line"] = escape_cells(images.rows).to_csv(index=False, header=False).splitlines()
    html = render_page(
        "audit.html.j2",
        title=title,
        audit=shown,
        counts={issue: len(rows) for issue, rows in audit.items()},
        across=count_pairs_across_splits(audit),
        num_images=len(images.rows),
        num_checked=int(images.is_checked.sum()),
        accuracy=images.accuracy,
        photos=photos.to_dict("records"),
        draw=lambda row: draw_photo(*images.sources[row]),
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(csv_file) as temporary_file:
        escape_cells(table.drop(columns=["row", "other_row"])).to_csv(temporary_file, index=False)
    with write_atomically(page) as temporary_file:
        temporary_file.write_text(html, encoding="utf-8")
    return csv_file


def escape_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table whose texts are safe cells of a CSV file."""
    return table.map(lambda value: escape_csv_cell(value) if isinstance(value, str) else value)


def draw_photo(source: LabeledImages, index: int) -> str:
    """Return an image, large enough to judge its label, as a data URL."""
    photo = source.images[index].convert("RGB")
    photo.thumbnail((PHOTO_SIZE, PHOTO_SIZE))
    return encode_data_url(photo)
