"""Audit of a labeled dataset: label errors, near duplicates, outliers and overlapping classes.

    audit_checkpoint(options)         `evaluate --audit`: compute features and probabilities, audit, write
    audit = audit_dataset(images)     the tables, from labels, probabilities and features
    write_audit(audit, images, ...)   audit.html with photos, and audit.csv for `finetune --exclude`

Label errors, outliers and overlapping classes are cleanlab's (Northcutt et al. 2021, arXiv
1911.00068). Probabilities must come from a model that was not trained on the image: held-out, or
out-of-fold for a run with folds. A classifier that is wrong about many images also lists many right
labels, so its accuracy is printed as well. Near duplicates are neighbors in the model's
features, or in small copies of the images, whose pixels agree.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from rich.console import Console
from scipy.special import softmax
from sklearn.model_selection import cross_val_predict
from sklearn.neighbors import NearestNeighbors

from ..conversion.any_checkpoint import resolve
from ..data.images import LabeledImages
from ..data.label_matching import match_labels
from ..data.labels import get_label_space
from ..data.sources import load_splits
from ..data.splits import (
    choose_fitting_and_evaluation_split,
    find_trained_images,
    read_splits,
    select_task,
)
from ..hub.model_files import PREDICTIONS_FILE
from ..inference.evaluate import MAX_BATCH_SIZE, set_up_evaluation, write_results
from ..inference.frozen import build_classifier
from ..inference.image_pass import ImagePass, stack_rows
from ..inference.linear_probe import LinearProbe
from ..inference.load_model import TORCH, load_for_inference
from ..inference.options import EvaluateOptions
from ..model.heads_vitcls import IGNORED_LABEL
from ..runtime.errors import describe_installation
from ..runtime.files import escape_csv_cell, write_atomically
from ..runtime.progress import report_work
from .report import encode_data_url, render_page


NUM_FOLDS = 5  # folds of the cross-validation with `frozen`
# The classifier's features: CLS and the mean of the patches. Scaling them changed nothing.
# of cleanlab's choices, the one with the fewest right labels (docs/evaluating.md)
LABEL_FILTER = "low_self_confidence"
NUM_NEIGHBORS = 5  # neighbors in feature space whose pixels are compared
THUMBNAIL_SIZE = 32  # side of the compared images in pixels
PHOTO_SIZE = 192  # longer side of the images on the page in pixels
MAX_PIXEL_DISTANCE = 0.1  # maximum distance of near duplicates, 1 - correlation of the pixels
# Near duplicates are at most this fraction of the distance at which images of the dataset usually
# have a neighbor. Without this limit, all images of the digit 1 would be duplicates.
MAX_RELATIVE_DISTANCE = 0.25
OUTLIER_FRACTION = 0.01  # fraction of the images that the page lists as outliers
MAX_SHOWN = 100  # maximum number of rows of a table with photos
BLOCK_SIZE = 1024  # images whose neighbors' pixels are compared at once


@dataclass(frozen=True)
class AuditedImages:
    """Readable images with the outputs of a model. All lists have N entries."""

    ids: list[str]  # path or index of each image in its split
    splits: list[str]
    labels: np.ndarray  # [N], label indices
    probabilities: np.ndarray  # [N, L]; NaN for images that the model was trained on
    features: np.ndarray  # [N, D]
    pixels: np.ndarray  # [N, THUMBNAIL_SIZE, THUMBNAIL_SIZE, 3], uint8
    sources: list[tuple[Sequence[Any], int]]  # images of the split, and the index of the image
    names: list[str]  # of the labels

    @property
    def is_checked(self) -> np.ndarray:
        """Return whether the label of each image [N] can be checked."""
        return np.isfinite(self.probabilities).all(axis=1)

    @property
    def accuracy(self) -> float | None:
        """Return the fraction of the checked labels that are predicted; None without any."""
        if not self.is_checked.any():
            return None
        predicted = self.probabilities[self.is_checked].argmax(axis=1)
        return float((predicted == self.labels[self.is_checked]).mean())


def audit_checkpoint(options: EvaluateOptions) -> dict[str, Any]:
    """Audit a dataset, write the page and the table, and return the number of issues of each kind.

    Features are the CLS tokens and the mean of the patches. Probabilities are the classifier's for
    held-out images or, with `frozen`, those of a classifier on the features that was fitted
    without the image, for all images. If the model is the output folder of a run with folds,
    they are those of the model that held out the image, for all images, and the features are those
    of the first fold's model.

    Raises:
        ValueError: if the dataset has several labels per image, if the model has no classifier
            without `frozen`, or if the page or the table exists without `overwrite`.
        OSError: if the model or the dataset cannot be read, or the page cannot be written.
    """
    assert options.audit is not None
    for file in (options.audit, options.audit.with_suffix(".csv")):
        if file.exists() and not options.overwrite:
            raise ValueError(
                f"{file} exists, and may have been edited. Set `overwrite=True`, or another `audit`"
            )
    images, num_unreadable, console = load_audited_images(options)
    audit = audit_dataset(images)
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
        f"{len(images.ids):,} images: {counts['duplicate']} near duplicates, {counts['label']} "
        f"possible label errors, {counts['outlier']} outliers, {counts['overlap']} pairs of "
        "classes that overlap"
    )
    if counts["label"]:
        console.print(
            f"the classifier that checked the labels predicts {images.accuracy:.1%} of them: the "
            "lower this number, the more of the possible label errors are right labels"
        )
    console.print(f"saved {options.audit} and {csv_file.name}", markup=False)
    results = counts | {
        "across_splits": across,
        "num_images": len(images.ids),
        "num_unreadable_images": num_unreadable,
        "accuracy": images.accuracy,
    }
    write_results(results, options.output, console)
    return results


def compute_features_and_logits(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the features [B, F] of images [B, C, H, W], then the logits [B, L] of a classifier.

    The features are the CLS tokens and the mean of the patches.
    """
    outputs = model(pixel_values, output_hidden_states=True)
    tokens = model.base_model.normalize(outputs.hidden_states[-1])
    layout = model.config.token_layout
    mean = tokens[:, layout.patches].mean(dim=1, keepdim=True)
    features = torch.cat([tokens[:, layout.cls], mean], dim=1).flatten(1)
    logits = getattr(outputs, "logits", None)
    return features if logits is None else torch.cat([features, logits], dim=1)


def load_audited_images(options: EvaluateOptions) -> tuple[AuditedImages, int, Console]:
    """Return the audited images, the number of unreadable ones, and the main process's console.

    The images are those for training and the held-out ones, with features and probabilities.
    """
    if find_spec("cleanlab") is None:
        raise ValueError(f"`audit` requires cleanlab. {describe_installation('audit')}")
    folds = [] if options.frozen else sorted(Path(options.model).glob(f"fold-*/{PREDICTIONS_FILE}"))
    folder = resolve(str(folds[0].parent) if folds else options.model)
    is_cross_validated = folder.saved_results.get("split") == "cross-validation"
    if not options.frozen and is_cross_validated and not folds:
        folds = [folder.path / PREDICTIONS_FILE]
    if options.frozen is None and not folder.config.num_labels:
        raise ValueError(
            "`audit` requires a classifier, but the model has none. Set `frozen='logreg'`"
        )

    accelerator, console, warn = set_up_evaluation(options.mixed_precision)
    loaded = load_for_inference(
        folder,
        replace(options, backend=TORCH),
        accelerator,
        use_head=options.frozen is None,
        max_batch_size=MAX_BATCH_SIZE,
        print_line=partial(console.print, markup=False),
    )
    splits = select_task(read_splits(folder), None)
    choose_splits = partial(choose_fitting_and_evaluation_split, options.split, options.dataset)
    data = load_splits(options, select=list if folds else choose_splits)
    if data.label_space.kind != "single_label_classification":
        raise ValueError("`audit` requires one label per image. Set a single `label_column`")
    if options.frozen:
        check_class_sizes(data.images_by_split.values())

    model_space = get_label_space(loaded.config)
    label_space = data.label_space if options.frozen else model_space
    parts = []
    num_unreadable = 0
    for name, images in data.images_by_split.items():
        images = images.draw(options.max_images, options.split_seed)
        if not options.frozen:
            images = match_labels(images, data.label_space, model_space)
        image_pass = ImagePass(
            images=images,
            processor=loaded.processor,
            label_space=label_space,
            options=options,
            batch_size=loaded.batch_size,
            accelerator=accelerator,
            num_channels=loaded.config.num_channels,
            warn=warn,
        )
        is_held_out = np.ones(len(images), dtype=bool)
        if not options.frozen and not folds:
            is_held_out = ~find_trained_images(images, splits)
            console.print(
                f"labels checked: {is_held_out.sum():,} of {len(images):,} images of split "
                f"{name!r}; training used the others",
                markup=False,
            )
        parts.append(audit_split(name, images, image_pass, loaded.model, is_held_out, console))
        num_unreadable += image_pass.num_unreadable

    audited = join_parts(parts)
    if folds:
        probabilities = read_fold_probabilities(folds, audited.ids, len(model_space.names))
        audited = replace(audited, probabilities=probabilities)
    elif options.frozen:
        with report_work("cross-validation", console):
            probabilities = predict_out_of_fold(options.frozen, audited)
        audited = replace(audited, probabilities=probabilities)
    return audited, num_unreadable, console


def audit_split(
    name: str,
    images: LabeledImages,
    image_pass: ImagePass,
    model: Any,
    is_held_out: np.ndarray,
    console: Console,
) -> AuditedImages:
    """Pass the images of a split through the model.

    The probabilities are those of its classifier, or [N, 0] for an encoder.
    """
    rows = image_pass.collect(model, partial(compute_features_and_logits, model), console)
    values, labels = stack_rows(rows)
    indices = [row.index for row in rows]
    num_features = (model.config.num_cls_tokens + 1) * model.config.hidden_size
    logits = values[:, num_features:]
    probabilities = softmax(logits, axis=1) if logits.size else logits
    return AuditedImages(
        ids=[row.name for row in rows],
        splits=[name] * len(rows),
        labels=labels,
        probabilities=np.where(is_held_out[indices, None], probabilities, np.nan),
        features=values[:, :num_features],
        pixels=np.stack([make_thumbnail(images.images[index]) for index in indices]),
        sources=[(images.images, index) for index in indices],
        names=image_pass.label_space.names,
    )


def join_parts(parts: Sequence[AuditedImages]) -> AuditedImages:
    """Return the images of all parts, which have the same label names."""
    joined = {
        field: np.concatenate([getattr(part, field) for part in parts])
        for field in ("labels", "probabilities", "features", "pixels")
    }
    return AuditedImages(
        ids=[each for part in parts for each in part.ids],
        splits=[each for part in parts for each in part.splits],
        sources=[each for part in parts for each in part.sources],
        names=parts[0].names,
        **joined,
    )


def predict_out_of_fold(kind: str, images: AuditedImages) -> np.ndarray:
    """Return the probabilities [N, L] of a classifier that was fitted without the image.

    The regularization of a logistic regression is chosen, because the probabilities of one that
    fits every training image mark many more right labels. The only image of a class has NaN.
    """
    if kind == "logreg":
        probe = LinearProbe().fit(images.features, images.labels)
        if not probe.num_folds_:
            raise ValueError(
                "`frozen='logreg'` requires two images of each of two classes. Add images, or set "
                "`frozen='knn'`"
            )
        probabilities = np.zeros((len(images.labels), len(images.names)))
        probabilities[:, probe.classes_] = probe.out_of_fold_
        return probabilities
    classifier = build_classifier(kind, len(images.labels) * (NUM_FOLDS - 1) // NUM_FOLDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes with fewer than five images
        return cross_val_predict(  # type: ignore[no-any-return]
            classifier, images.features, images.labels, cv=NUM_FOLDS, method="predict_proba"
        )


def check_class_sizes(parts: Iterable[LabeledImages]) -> None:
    """Raise ValueError if no class has an image for each fold of the cross-validation."""
    sizes = Counter(label for images in parts for label in images.labels if label != IGNORED_LABEL)
    if sizes and max(sizes.values()) < NUM_FOLDS:
        raise ValueError(
            f"`audit` with `frozen` requires {NUM_FOLDS} images of a class, but the largest class "
            f"has {max(sizes.values())}. Add images, or audit with a classifier (without `frozen`)"
        )


def read_fold_probabilities(files: list[Path], ids: Sequence[str], num_labels: int) -> np.ndarray:
    """Return the out-of-fold probabilities [N, L] of images; NaN for images without a prediction.

    They are the predictions of each fold's held-out images.
    """
    rows = pd.concat(pd.read_parquet(file, columns=["image", "probabilities"]) for file in files)
    by_image = dict(zip(rows["image"], rows["probabilities"], strict=True))
    missing = np.full(num_labels, np.nan)
    return np.stack([by_image.get(name, missing) for name in ids])


def make_thumbnail(image: Image.Image) -> np.ndarray:
    """Return the pixels of the image at the size for comparisons."""
    return np.asarray(
        image.convert("RGB").resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.BOX)
    )


def audit_dataset(images: AuditedImages) -> dict[str, pd.DataFrame]:
    """Return a table for each kind of issue, with the most severe issue first.

    Columns: `split`, `id`, `label`, `score` (low is severe), `suggested` (label errors), and
    `other` and `other_split` (near duplicates). `overlap` has cleanlab's columns of pairs of
    classes.
    """
    return {
        "duplicate": find_near_duplicates(images),
        "label": find_label_errors(images),
        "outlier": find_outliers(images),
        "overlap": find_class_overlap(images),
    }


def find_label_errors(images: AuditedImages) -> pd.DataFrame:
    """Return the images that confident learning marks as possible label errors.

    Confident learning estimates their number; they are those with the lowest score. The
    score is the label's probability, from a model that was not trained on the image.
    """
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    known = np.flatnonzero(images.is_checked)
    labels, probabilities = images.labels[known], images.probabilities[known]
    scores = get_label_quality_scores(labels, probabilities, method="self_confidence")
    is_issue = find_label_issues(labels, probabilities, filter_by=LABEL_FILTER, n_jobs=1)
    order = np.argsort(scores, kind="stable")
    order = order[is_issue[order]]
    rows = build_rows(images, known[order], scores[order])
    return rows.assign(
        suggested=[images.names[index] for index in probabilities[order].argmax(axis=1)]
    )


def find_outliers(images: AuditedImages) -> pd.DataFrame:
    """Return the images whose features are far from those of all other images."""
    from cleanlab.outlier import OutOfDistribution

    scores = OutOfDistribution().fit_score(features=images.features, verbose=False)
    order = np.argsort(scores, kind="stable")[: max(1, round(OUTLIER_FRACTION * len(scores)))]
    return build_rows(images, order, scores[order])


def find_class_overlap(images: AuditedImages) -> pd.DataFrame:
    """Return pairs of classes, those with the most images of the other class first."""
    from cleanlab.dataset import find_overlapping_classes

    known = images.is_checked
    table = find_overlapping_classes(
        images.labels[known], images.probabilities[known], class_names=images.names
    )
    return table[table["Num Overlapping Examples"] > 0]


def find_near_duplicates(images: AuditedImages) -> pd.DataFrame:
    """Return pairs of images with the same content. Pairs across splits come first."""
    colors = images.pixels.astype(np.float32)
    num_images = len(images.pixels)
    pixels = standardize(colors)
    mirrored = standardize(colors[:, :, ::-1])
    cell = THUMBNAIL_SIZE // 8
    cells = colors.reshape(num_images, 8, cell, 8, cell, 3).mean(axis=(2, 4))  # [N, 8, 8, 3]
    coarse = standardize(cells)
    coarse_mirrored = standardize(cells[:, :, ::-1])
    num_neighbors = min(NUM_NEIGHBORS + 1, num_images)  # including the image itself
    searches = ((images.features, images.features), (coarse, coarse), (coarse_mirrored, coarse))
    all_neighbors = np.hstack(
        [
            NearestNeighbors(n_neighbors=num_neighbors, metric="cosine")
            .fit(vectors)
            .kneighbors(queries)[1]
            for queries, vectors in searches
        ]
    )  # [N, K]
    closest = np.full(num_images, np.inf)  # smallest distance of each image to a neighbor
    pairs: dict[tuple[int, int], float] = {}
    for start in range(0, num_images, BLOCK_SIZE):
        neighbors = all_neighbors[start : start + BLOCK_SIZE]  # [B, K]
        rows = np.arange(start, start + len(neighbors))
        candidates = pixels[neighbors]  # [B, K, P]
        agreement = np.maximum(
            np.einsum("bp,bkp->bk", pixels[rows], candidates),
            np.einsum("bp,bkp->bk", mirrored[rows], candidates),
        )
        agreement[neighbors == rows[:, None]] = -1
        closest[rows] = (1 - agreement).min(axis=1)
        for row, column in zip(*np.nonzero(1 - agreement <= MAX_PIXEL_DISTANCE), strict=True):
            first, second = sorted((int(rows[row]), int(neighbors[row, column])))
            pairs[first, second] = float(1 - agreement[row, column])
    limit = min(MAX_PIXEL_DISTANCE, MAX_RELATIVE_DISTANCE * float(np.median(closest)))
    # An identical image is a duplicate even if most images of the dataset have one.
    found = [(pair, distance) for pair, distance in pairs.items() if distance <= max(limit, 1e-5)]
    found.sort(key=lambda item: (images.splits[item[0][0]] == images.splits[item[0][1]], item[1]))
    rows = build_rows(
        images,
        np.array([pair[0] for pair, _ in found], int),
        np.array([d for _, d in found], float),
    )
    others = [pair[1] for pair, _ in found]
    return rows.assign(
        other=[images.ids[index] for index in others],
        other_split=[images.splits[index] for index in others],
        other_row=others,
    )


def standardize(images: np.ndarray) -> np.ndarray:
    """Return images [N, ...] as vectors [N, P] of mean 0 and length 1, or 0 if constant."""
    flat = images.reshape(len(images), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)


def build_rows(images: AuditedImages, indices: np.ndarray, scores: np.ndarray) -> pd.DataFrame:
    """Return the columns that all kinds of issues have."""
    return pd.DataFrame(
        {
            "split": [images.splits[index] for index in indices],
            "id": [images.ids[index] for index in indices],
            "label": [images.names[images.labels[index]] for index in indices],
            "score": np.round(scores, 4),
            "row": indices,
        }
    )


def write_audit(
    audit: dict[str, pd.DataFrame], images: AuditedImages, page: Path, title: str
) -> Path:
    """Write the page, and a CSV file with one row per issue to the same folder.

    Return the path of the file. Texts in the table are escaped, because labels and file names may
    be formulas of a spreadsheet.
    """
    tables = {issue: rows for issue, rows in audit.items() if issue != "overlap"}
    table = pd.concat(tables, names=["issue", None]).drop(columns=["row", "other_row"])
    page.parent.mkdir(parents=True, exist_ok=True)
    csv_file = page.with_suffix(".csv")
    table = table.reset_index("issue").map(
        lambda value: escape_csv_cell(value) if isinstance(value, str) else value
    )
    shown = {issue: rows.head(MAX_SHOWN).to_dict("records") for issue, rows in audit.items()}
    html = render_page(
        "audit.html.j2",
        title=title,
        shown=shown,
        counts={issue: len(rows) for issue, rows in audit.items()},
        across=count_pairs_across_splits(audit),
        num_images=len(images.ids),
        num_checked=int(images.is_checked.sum()),
        accuracy=images.accuracy,
        thumbnail=partial(draw_photo, images),
        csv_name=csv_file.name,
    )
    with write_atomically(csv_file) as temporary_file:
        table.to_csv(temporary_file, index=False)
    with write_atomically(page) as temporary_file:
        temporary_file.write_text(html, encoding="utf-8")
    return csv_file


def draw_photo(images: AuditedImages, row: int) -> str:
    """Return an image, large enough to judge its label, as a data URL."""
    source, index = images.sources[row]
    photo = source[index].convert("RGB")
    photo.thumbnail((PHOTO_SIZE, PHOTO_SIZE))
    return encode_data_url(photo)


def count_pairs_across_splits(audit: dict[str, pd.DataFrame]) -> int:
    """Return the number of near duplicates whose images are in different splits."""
    return int((audit["duplicate"]["split"] != audit["duplicate"]["other_split"]).sum())
