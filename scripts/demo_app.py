"""Show in a browser what a model sees in pictures: labels, and where every special token looks.

    python scripts/demo_app.py --model runs/mine
    python scripts/demo_app.py --model someone/their-model --revision COMMIT --port 8000

scripts/push_space.py publishes the same page on the Hub. The work is done in modeling_vitcls/demo/.
"""

from dataclasses import dataclass
from pathlib import Path

from command_line import errors_in_one_line, from_flags


@dataclass(frozen=True)
class DemoOptions:
    """Show in a browser what a model sees in pictures."""

    model: str
    """Folder of a model, or its id on the Hub."""
    revision: str | None = None
    """Commit hash, branch or tag on the Hub. Default: the newest commit."""
    examples: tuple[Path, ...] = ()
    """Picture files to offer."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines in."""
    port: int | None = None
    """Default: the first that is free from 7860 on."""


def main() -> None:
    """Parse, load, serve; the package is imported only once the flags are known to be right."""
    options = from_flags(DemoOptions)

    from transformers.utils.logging import disable_progress_bar

    from modeling_vitcls.hub.loading import force_offline, get_cached_commit, get_model_folder

    disable_progress_bar()  # of loading weights
    with errors_in_one_line():
        folder = get_model_folder(options.model, revision=options.revision)
        from modeling_vitcls.demo.page import serve_demo  # gradio takes seconds to import

        with force_offline():  # all is here now, and nobody is asked again
            serve_demo(options.model, get_cached_commit(folder), options.examples, options.host, options.port)


if __name__ == "__main__":
    main()
