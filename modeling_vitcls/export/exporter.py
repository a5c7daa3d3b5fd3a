"""A checkpoint exported, compared and written, with its certificate beside it; all or nothing.

certificate = export_model("runs/mine", "onnx", Path("mine.onnx"))      # and mine.onnx.json
"""

import tempfile
from pathlib import Path

from ..hub.local_paths import resolve_name, strip_folders
from ..system import get_versions
from .export_report import (
    LIMITS,
    Certificate,
    compared,
    hashes,
    images,
    input_facts,
    label_names,
    largest_differences,
    model_answers,
    output_shapes,
    preprocessing_facts,
    shapes_to_try,
)
from .exportable import load_exportable
from .formats import FORMATS, Format, Traced
from .tracing import DTYPES, plan_for, traced


def export_model(
    source: str,
    format_name: str,
    output: Path,
    image_size: tuple[int, int] | None = None,
    dynamic: bool = True,
    dtype: str = "float32",
    opset: int | None = None,
) -> Certificate:
    """Write the graph of a model to `output`, and its certificate to `output` with `.json` behind it.

    Args:
        source: A folder, a model of the Hub, or a preset, which gets random weights.
        format_name: "torch", "onnx" or "openvino".
        output: A file that does not exist yet, with the suffix of the format.
        image_size: (height, width), pixels, that the graph is meant for. Default: the model's own.
        dynamic: Leave the image size open. Where the model does not allow it, the certificate says why.
        dtype: Of weights and calculations; the graph takes and gives float32.
        opset: Of ONNX. Default: torch's.

    Raises:
        ValueError, OSError: in one line; nothing is written then. For a model that cannot be found or exported, a
            difference over the limit, packages that are missing, or an `output` that is in use.
    """
    chosen = FORMATS[format_name]
    check_output(output, chosen)
    check_packages(format_name, chosen)
    exportable = load_exportable(source)
    model = exportable.model
    plan = plan_for(model, image_size, dynamic, chosen.has_antialias)
    batches = [images(shape) for shape in shapes_to_try(model.config, plan)]
    wanted = model_answers(model, batches)
    names = list(wanted[0])
    graph = Traced(traced(model, plan, DTYPES[dtype]), plan, names, opset)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=existing_folder(output)) as partial:
        file = Path(partial, output.name)
        written_opset = chosen.write(graph, file)
        trials = compared(batches, wanted, chosen.answers(file, batches, names), dtype)
        certificate = Certificate(
            format=format_name,
            model=strip_folders(resolve_name(source, is_built_in=not exportable.is_trained)),
            model_class=type(model).__name__,
            weights="trained" if exportable.is_trained else "random",
            dtype=dtype,
            opset=written_opset,
            limit=LIMITS[dtype],
            largest_differences=largest_differences(trials),
            tried=trials,
            input=input_facts(model.config, plan),
            outputs=output_shapes(wanted[0], plan),
            fixed_because=plan.reason,
            preprocessing=preprocessing_facts(exportable.processor),
            labels=label_names(model.config, names),
            versions=get_versions("timm", *chosen.packages),
            sha256=hashes(Path(partial)),
        )
        certificate.save(certificate_beside(file))
        move_all(Path(partial), output.parent)
    return certificate


def certificate_beside(file: Path) -> Path:
    """Where the certificate of an exported file is."""
    return file.with_name(f"{file.name}.json")


def check_output(output: Path, chosen: Format) -> None:
    """Raise ValueError for another suffix than the format's, or a file that exists."""
    if output.suffix != chosen.suffix:
        raise ValueError(f"--output {output}: give a file name that ends with {chosen.suffix}")
    for file in (output, certificate_beside(output)):
        check_free(file)


def check_free(file: Path) -> None:
    """Raise ValueError if there is one already."""
    if file.exists():
        raise ValueError(f"{file} exists: name another file, or remove it")


def existing_folder(output: Path) -> Path:
    """The folder of `output`, or the nearest one above it that exists."""
    return next(folder for folder in output.absolute().parents if folder.is_dir())


def move_all(source: Path, target: Path) -> None:
    """Move the files of one folder to another, which is made if need be.

    Raises:
        ValueError: if one of them is there already; none is moved then.
    """
    files = sorted(source.iterdir())
    for file in files:
        check_free(target / file.name)
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        file.rename(target / file.name)


def check_packages(format_name: str, chosen: Format) -> None:
    """Raise ValueError where some of other projects' packages are missing."""
    if missing := chosen.missing_packages():
        raise ValueError(
            f"--format {format_name} needs {', '.join(missing)}: run pip install 'modeling_vitcls[export]'"
        )
