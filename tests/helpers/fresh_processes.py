"""Start new Python processes quickly: forks of a server that has imported torch.

    ran = run_fresh(script, "--flag")          as subprocess.run([sys.executable, script, "--flag"])
    ran = run_fresh("-I", "-c", code, folder)  the same, in isolated mode
    ran = run_fresh("-m", "modeling_vitcls.cli", "predict")

The forks import this package, transformers and the other libraries that read environment variables
at import. Tests of the first import start real processes, for example in test_predict.py. Tests
that need no new import use warm_processes.py.
"""

import atexit
import functools
import gc
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
SECONDS = 300  # timeout of a process
OPTIONS = {"-I", "-P"}
# Environment variables for scripts: import this repository; one thread, no GPU, no Hub, a wide
# terminal.
SCRIPT_ENVIRONMENT = {
    "PYTHONPATH": str(Path(__file__).parents[2]),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "200",
}


# In the test process ------------------------------------------------------------------------------


def run_fresh(
    *arguments: object, environment: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a Python process and return its exit status and output.

    Args:
        arguments: options `-I` or `-P`, then a script, `-m MODULE` or `-c CODE`, then its flags.
        environment: all environment variables of the process. Default: the variables of this
            process.
        cwd: working directory. Default: the working directory of this process.
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
        requests, replies = start_server().stdin, start_server().stdout
        print(json.dumps(request), file=requests, flush=True)
        reply = replies.readline()
        assert reply, "the server of new processes has ended"
        status = int(reply)
        printed, errors = (output.read_text(encoding="utf-8") for output in outputs)
    assert status != -signal.SIGKILL, f"{words} did not end in {SECONDS} s: {printed}{errors}"
    return subprocess.CompletedProcess(words, status, printed, errors)


@functools.cache
def start_server() -> subprocess.Popen[str]:
    """Start the server at the first call and return it. It ends when its input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-I", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(process.kill)
    return process


# In the server ------------------------------------------------------------------------------------


def serve() -> None:
    """Run each request in a fork, and print the exit status of the fork."""
    for line in sys.stdin:
        process = multiprocessing.get_context("fork").Process(
            target=run_request, kwargs=json.loads(line)
        )
        process.start()
        process.join(SECONDS)
        process.kill()
        process.join()
        print(process.exitcode, flush=True)


def run_request(
    words: list[str], environment: dict[str, str], cwd: str, outputs: list[str]
) -> None:
    """Run a Python command in this process as if the process had been started for it."""
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
        sys.path.insert(0, "" if script in ("-c", "-m") else str(Path(script).parent))
    if script == "-m":
        runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
    elif script == "-c":
        exec(sys.argv.pop(1), {"__name__": "__main__"})
    else:
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    for library in PRELOADED:
        importlib.import_module(library)
    assert not NOT_LOADED & sys.modules.keys(), NOT_LOADED & sys.modules.keys()
    gc.freeze()
    serve()
