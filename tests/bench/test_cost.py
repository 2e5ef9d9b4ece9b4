"""What the test commands cost beside the demo: processor seconds (user and system, children included) and minutes.

    python tests/bench/test_cost.py

Runs `python -m lorakit demo`, `bash colab_setup.sh test` and `bash colab_setup.sh test --all`, one after the other, and
compares. Everything must be installed already; the machine must be quiet. Processes that their parents leave behind
are counted too, which needs Linux.
"""

import argparse
import ctypes
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from base_quality import RESULTS, table, write

ROOT = Path(__file__).parents[2]
PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>: orphans become this process's children, so that their time is counted
HEADS = ("command", "processor seconds", "times the demo's", "bar", "minutes", "bar")
BARS = {"test": (5, 6), "test --all": (10, 12)}  # at most so many times the demo's processor seconds, and minutes


def measured(command: list[str], folder: Path) -> tuple[float, float]:
    """Processor seconds and seconds of a command, which must succeed."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    status = subprocess.run(command, cwd=ROOT, env=os.environ | {"TMPDIR": str(folder)}).returncode
    seconds = time.monotonic() - began
    if status:
        sys.exit(f"{' '.join(command)} failed: {status}")
    deadline = time.monotonic() + 20  # for processes that were left behind to end
    while time.monotonic() < deadline:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.1)
        except ChildProcessError:
            break
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=["test", "test --all"], help="leave the other one out")
    parser.add_argument("--out", type=Path, default=RESULTS / "test_cost")
    options = parser.parse_args()
    about = f"{os.cpu_count()} cores, Python {platform.python_version()}\n"
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with tempfile.TemporaryDirectory() as folder:
        demo = measured([sys.executable, "-m", "lorakit", "demo", "--out", f"{folder}/demo"], Path(folder))
        rows, figures = [["demo", f"{demo[0]:.0f}", "1", "", f"{demo[1] / 60:.1f}", ""]], {"demo": demo}
        for name, (times, minutes) in BARS.items():
            if options.only in (None, name):
                cost = figures[name] = measured(["bash", "colab_setup.sh", *name.split()], Path(folder))
                rows.append([f"`{name}`", f"{cost[0]:.0f}", f"{cost[0] / demo[0]:.2f}", f"≤ {times}",
                             f"{cost[1] / 60:.1f}", f"≤ {minutes}"])  # fmt: skip
                write(options.out, "What the tests cost", [about, table(rows, *HEADS)], figures)


if __name__ == "__main__":
    main()
