# /// script
# requires-python = ">=3.11"
# dependencies = ["modeling_vitcls[cli]"]
#
# [tool.uv.sources]
# modeling_vitcls = { path = "..", editable = true }
# ///
"""Compare settings in a grid of fine-tuning runs. This script is equivalent to `vitcls study`.

python scripts/study.py --config scripts/recipes/study_digits.yaml --output-dir runs/study --jobs 2
"""

import sys


if __name__ == "__main__":
    sys.argv[:1] = ["vitcls", "study"]

    from modeling_vitcls.cli import main

    main()
