"""Additions of tasks and classes that read images in this process."""

from functools import partial

import modeling_vitcls


add_task = partial(modeling_vitcls.add_task, num_workers=0)
add_class = partial(modeling_vitcls.add_class, num_workers=0)
