"""New Python processes that have torch at once: forks of a server that has imported it, and nothing of ours.

    ran = run_fresh(script, "--flag", environment=environment)    as subprocess.run([sys.executable, script, "--flag"])
    ran = run_fresh("-I", "-c", code, folder)                     the same, isolated

Such a process imports this package, transformers and all else that reads the environment itself, or finds that it
cannot. What must be seen from the first import on is tested in real processes, as test_predict.py does; what may be as
warm as it likes starts from warm_processes.py.
"""

import atexit
import functools
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path


PRELOADED = (
    "torch",
    "torchvision.transforms.v2",
    "scipy.optimize",
    "sklearn.datasets",
    "rich.console",
    "tyro",
)
NOT_LOADED = {"modeling_vitcls", "transformers", "huggingface_hub", "datasets", "accelerate"}
SECONDS = 300  # after which a process is ended
OPTIONS = {"-I", "-P"}


# In the tests' process -----------------------------------------------------------------------------------------------


def run_fresh(
    *arguments: object, environment: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """A Python process, until it has ended, with what it printed.

    Args:
        arguments: `-I` or `-P` if wanted, then a script or `-c CODE`, then its flags.
        environment: all of it, or else this process's.
        cwd: where it starts, or else here.
    """
    words = list(map(str, arguments))
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        request = {
            "words": words,
            "environment": dict(os.environ if environment is None else environment),
            "cwd": str(cwd or Path.cwd()),
            "outputs": list(map(str, outputs)),
        }
        requests, answers = server().stdin, server().stdout
        assert requests is not None and answers is not None
        print(json.dumps(request), file=requests, flush=True)
        answer = answers.readline()
        assert answer, "the server of fresh processes has ended"
        status = int(answer)
        printed, errors = (output.read_text(encoding="utf-8") for output in outputs)
    assert status != -signal.SIGKILL, f"{words} did not end in {SECONDS} s: {printed}{errors}"
    return subprocess.CompletedProcess(words, status, printed, errors)


@functools.cache
def server() -> subprocess.Popen[str]:
    """Started when first asked for; it ends when its input does, with this process at the latest."""
    process = subprocess.Popen(
        [sys.executable, "-I", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(process.kill)
    return process


# In the server -------------------------------------------------------------------------------------------------------


def serve() -> None:
    """Answer each request by the exit status of a fork that did it."""
    for line in sys.stdin:
        process = multiprocessing.get_context("fork").Process(target=become, kwargs=json.loads(line))
        process.start()
        process.join(SECONDS)
        process.kill()
        process.join()
        print(process.exitcode, flush=True)


def become(words: list[str], environment: dict[str, str], cwd: str, outputs: list[str]) -> None:
    """Run what was asked for as if this process had been started for it."""
    for descriptor, file in enumerate(outputs, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    if "OMP_NUM_THREADS" in environment:
        sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))
    options = {words.pop(0) for _ in range(len(words)) if words[0] in OPTIONS}
    script, *sys.argv[1:] = words
    sys.argv[0] = script
    if "-I" not in options:
        sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    if not options:
        sys.path.insert(0, "" if script == "-c" else str(Path(script).parent))
    if script == "-c":
        exec(sys.argv.pop(1), {"__name__": "__main__"})
    else:
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    for library in PRELOADED:
        importlib.import_module(library)
    assert not NOT_LOADED & sys.modules.keys(), NOT_LOADED & sys.modules.keys()
    serve()
