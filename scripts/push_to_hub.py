# /// script
# requires-python = ">=3.11"
# dependencies = ["modeling_vitcls[cli]"]
#
# [tool.uv.sources]
# modeling_vitcls = { path = "..", editable = true }
# ///
"""Push a model to the Hub and verify the pushed commit. This script is equivalent to `vitcls push`.

python scripts/push_to_hub.py --model runs/mine --hub-model-id me/my-model
"""

import sys


if __name__ == "__main__":
    sys.argv[:1] = ["vitcls", "push"]

    from modeling_vitcls.cli import main

    main()
