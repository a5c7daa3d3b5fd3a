"""Files of the export formats: errors for files that do not run."""

from pathlib import Path

import pytest
from helpers.tiny_models import build_images, raises_one_line

from modeling_vitcls.export import formats


pytestmark = pytest.mark.integration


def test_files_that_do_not_run(tmp_path: Path) -> None:
    (tmp_path / "vit.onnx").write_text("damaged")
    with raises_one_line("vit.onnx"):
        formats.run_graph(tmp_path / "vit.onnx", [build_images()], ["logits"])
