# /// script
# requires-python = ">=3.11"
# dependencies = ["modeling_vitcls[export,scripts]"]
#
# [tool.uv.sources]
# modeling_vitcls = { path = "..", editable = true }
# ///
"""Export a model to ONNX.

This script is equivalent to `vitcls export`.

python scripts/export.py --model runs/mine --output mine.onnx
"""

import sys


if __name__ == "__main__":
    sys.argv[:1] = ["vitcls", "export"]

    from modeling_vitcls.cli import main

    main()
