"""From JPEG files to labels: the work of scripts/predict.py against transformers' pipeline.

    python -m modeling_vitcls.benchmarking.predictions FOLDER ours [--toy]

Each side is in a process of its own, because ours chooses how it uses memory (system.py). Such a process
answers each line it reads, `labels 16` or `speed 16` for batches of 16, with a line: the most probable label and its
probability for each file of the folder, or images per second.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

from ..inference.inputs import listed_files
from ..inference.predict import Predictor, default_num_workers
from ..inference.prediction_rows import build_answers
from ..system import keep_memory
from .comparison import Comparison, chosen, in_turns, last_words, per_second
from .image_processing import image_processors, photographs
from .peers import SMALL, TOY, Size, against_transformers


LARGEST_DIFFERENCE = 1e-4  # of probabilities
PREDICTION_ROWS = {"fp32, batch 16": 16, "fp32, batch 1": 1}

Label = tuple[str, float]  # the most probable one, with its probability
Labels = Callable[[int], list[Label]]  # of all files in their order, in batches of that size


def compare_prediction(rows: tuple[str, ...], num_pairs: int, toy: bool) -> Iterator[Comparison]:
    """The named rows of `PREDICTION_ROWS`, or all: what scripts/predict.py does once the model is loaded.

    Raises:
        ValueError: for an unknown row, if labels or probabilities differ, or if a side fails.
    """
    sizes = chosen(PREDICTION_ROWS, rows)
    with tempfile.TemporaryDirectory() as folder:
        num_files = len(photographs(Path(folder), toy))
        details = {"num_files": num_files, "size": vars(TOY if toy else SMALL)}
        with Side("ours", folder, toy) as ours, Side("theirs", folder, toy) as theirs:
            for name, batch_size in sizes.items():
                difference = check_labels(ours.ask("labels", batch_size), theirs.ask("labels", batch_size), name)
                measured = in_turns(
                    lambda size=batch_size: ours.ask("speed", size),  # type: ignore[misc]
                    lambda size=batch_size: theirs.ask("speed", size),  # type: ignore[misc]
                    num_pairs,
                )
                yield Comparison("predict.py on JPEG files", name, "pipeline", *measured, difference, details)


def check_labels(ours: list[Label], theirs: list[Label], name: str) -> float:
    """The largest difference between the probabilities of the most probable labels.

    Raises:
        ValueError: if labels differ, or probabilities by more than `LARGEST_DIFFERENCE`.
    """
    largest = 0.0
    for number, ((label, probability), (their_label, their_probability)) in enumerate(zip(ours, theirs, strict=True)):
        if label != their_label:
            raise ValueError(
                f"{name}: picture {number} is {label} for us and {their_label} for the pipeline: they do not do the "
                "same work, so their speed is not compared"
            )
        largest = max(largest, abs(probability - their_probability))
    if not largest <= LARGEST_DIFFERENCE:
        raise ValueError(f"{name}: probabilities differ by {largest:.2g}: this is not the same work")
    return largest


class Side:
    """One side's process, which waits while it is not asked. Use it as a context manager."""

    def __init__(self, name: str, folder: str, toy: bool) -> None:
        self.command = [sys.executable, "-m", __name__, folder, name, *(["--toy"] if toy else [])]
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  # closed by __exit__

    def __enter__(self) -> Self:
        """Start it."""
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, stderr=self.log, text=True)
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.log.close()

    def ask(self, question: str, batch_size: int) -> Any:
        """What it answers.

        Raises:
            ValueError: if it ends instead.
        """
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        print(question, batch_size, file=stdin, flush=True)
        if answer := stdout.readline():
            return json.loads(answer)
        self.log.seek(0)
        said = last_words(self.log.read().decode(errors="replace"))
        raise ValueError(f"{' '.join(self.command[2:5])} failed: {said}")


# In those processes --------------------------------------------------------------------------------------------------


def our_labels(size: Size, folder: Path) -> Labels:
    """As scripts/predict.py finds them."""
    keep_memory()
    processor, _ = image_processors(size, folder / "ours")
    model: Any = against_transformers(size).ours.eval()
    answers = build_answers(model, top_k=5, threshold=0.5, features=None)

    def labels(batch_size: int) -> list[Label]:
        predictor = Predictor(model, processor, answers, nullcontext, batch_size, default_num_workers())
        source = listed_files([str(folder / "photographs")])
        rows = predictor.rows(source, [range(source.num_images)], piece=source.num_images)
        return [(row["error"] or row["label"], row["probability"]) for row in rows]

    return labels


def their_labels(size: Size, folder: Path) -> Labels:
    """As transformers' pipeline finds them."""
    from transformers import pipeline

    _, processor = image_processors(size, folder / "theirs")
    model: Any = against_transformers(size).theirs.eval()
    files = sorted(map(str, folder.rglob("*.jpg")))
    ask = pipeline("image-classification", model=model, image_processor=processor, device="cpu")

    def labels(batch_size: int) -> list[Label]:
        found = ask(files, batch_size=batch_size, top_k=5)
        return [(image[0]["label"], image[0]["score"]) for image in found]

    return labels


SIDES = {"ours": our_labels, "theirs": their_labels}


def main() -> None:
    """Answer what is asked on standard input, until its end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--toy", action="store_true")
    arguments = parser.parse_args()
    labels = SIDES[arguments.side](TOY if arguments.toy else SMALL, arguments.folder)
    num_files = len(list(arguments.folder.rglob("*.jpg")))
    for line in sys.stdin:
        question, batch_size = line.split()
        if question == "labels":
            answer: Any = labels(int(batch_size))
        else:
            answer = per_second(lambda size=int(batch_size): labels(size), num_files, 0.0)  # type: ignore[misc]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
