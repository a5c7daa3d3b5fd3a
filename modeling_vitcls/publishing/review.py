"""A collection that a person looks at in rounds: what is known of its table, and the page of the next round.

    predict --answers ... --review page.html -> clicks -> answers.csv -> finetune --answers ... -> predict ...

Each page has the photos that the model is least sure about, some that look unknown, and a quarter that is
drawn at random by content: the same command shows the same photos, and a later round shows others.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from ..data.answers import HARD, RANDOM
from ..data.images import decode_image, to_encoded_image
from ..data.sampling import draw_numbers
from ..evaluation.evaluator import read_predictions
from ..inference.intervals import MIN_CORRECTED_IMAGES, compute_proportion_interval
from ..inference.options import PredictOptions
from ..inference.predict import Predicted
from .labels_page import Question, ask, mix, write_labels_page


RANDOM_PART = 1 / 4  # Part of the photos that is drawn at random
UNKNOWN_PART = 1 / 5  # Largest part of photos that look unknown


def review_predictions(options: PredictOptions, predicted: Predicted) -> None:
    """Say how much of a table of predictions is right, and write the page of the next round."""
    rows = pd.DataFrame(predicted.rows)
    rows = rows[rows["error"].isna() & rows["checksum"].notna()]
    rows["given"] = None
    if predicted.answers is not None:
        rows["given"] = rows["checksum"].map(predicted.answers["label"])
        print(f"table     {describe_table(rows, predicted)}")
    if options.review is not None:
        left = rows[rows["given"].isna() & ~rows["trained"].eq(True)].drop_duplicates("checksum")
        questions = choose_photos(left, options.review_count, predicted)
        labels = list(predicted.predictor.model.config.id2label.values())
        write_labels_page(options.review, questions, labels)
        print(f"{options.review}: {len(questions):,} photos to look at")


def describe_table(rows: pd.DataFrame, predicted: Predicted) -> str:
    """Say how much of a table is right: what was looked at, and the others by those drawn at random.

    The others are as right as their probabilities say, corrected by how far these are off for the photos
    that were drawn at random (Angelopoulos et al. 2023, arXiv 2301.09633). What a run says about the photos
    that trained it is from its cross-validation.

    Args:
        rows: of the table, with the label `given` by a person.
        predicted: with the answers and the model.
    """
    is_given = rows["given"].notna()
    text = f"{is_given.sum():,} of {len(rows):,} looked at"
    is_drawn = rows["checksum"].map(predicted.answers["chosen"]).eq(RANDOM)
    drawn = rows[is_drawn].drop_duplicates("checksum").set_index("checksum")
    out_of_fold = read_predictions(predicted.predictor.folder)
    if out_of_fold is not None and "checksum" in out_of_fold:
        known = out_of_fold.drop_duplicates("checksum").set_index("checksum")
        known = known[["prediction", "confidence"]].set_axis(["label", "probability"], axis=1)
        drawn.update(known)
    others = rows[~is_given]
    if others.empty:
        return text
    # Photos that are less sure than any other have been looked at already.
    drawn = drawn[drawn["probability"] >= others["probability"].min()]
    is_right = drawn["label"] == drawn["given"]
    if "unknown" in drawn:
        is_right |= drawn["given"].eq("") & drawn["unknown"]
    number = len(drawn)
    if number < MIN_CORRECTED_IMAGES:
        return (
            f"{text}; of {number:,} others that were drawn at random, {is_right.sum():,} were right. Look at "
            f"{MIN_CORRECTED_IMAGES - number:,} more for an estimate"
        )
    estimate = others["probability"].mean() + (is_right - drawn["probability"]).mean()
    estimate = float(np.clip(estimate, 0, 1))
    bounds = compute_proportion_interval(round(estimate * number), number)
    middle, low, high = (
        (is_given.sum() + len(others) * share) / len(rows) for share in (estimate, *bounds)
    )
    return (
        f"{text}; about {middle:.0%} of the table is right ({100 * low:.0f} to {100 * high:.0f}): these, and "
        f"{estimate:.0%} of the others, by {number:,} that were drawn at random"
    )


def choose_photos(left: pd.DataFrame, count: int, predicted: Predicted) -> list[Question]:
    """Choose photos without an answer, and draw them. No other photo is decoded."""
    keys = left["checksum"].map(lambda text: int(text, 16)).to_numpy(np.uint64)
    left = left.iloc[draw_numbers(keys, 4).argsort()]
    num_drawn = round(RANDOM_PART * count)
    drawn, left = left[:num_drawn], left[num_drawn:]
    unsure, unknown = HARD
    is_unknown = np.zeros(len(left), bool)
    if "unknown" in left:
        left = left.sort_values("distance")
        is_unknown = left["unknown"].to_numpy(bool)
    # The nearest of them may be of a class, and the farthest need no look.
    heap = left[is_unknown][: round(UNKNOWN_PART * count)]
    least = left[~is_unknown].sort_values("probability")[: count - len(drawn) - len(heap)]

    def read(row: Any) -> Image.Image:
        content = predicted.records[row.index].content
        return decode_image(to_encoded_image(content, Path()), row.image)

    kinds = {unsure: least, unknown: heap, RANDOM: drawn}
    bit_depth = predicted.predictor.processor.bit_depth
    asked: list[Question] = []
    for chosen, table in kinds.items():
        table = table.assign(prediction=table["label"], label="")
        asked = mix(asked, ask(table, chosen, read, bit_depth))
    return asked
