"""What the training panel costs: steps a second with it and without, and the time its drawing takes.

    python tests/bench/drawing.py

The embedded base trains in turns with the panel of `widgets.training` and without. Nothing is displayed, so that what
a page takes to show it is not in it; what is made and sent is.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from base_quality import RESULTS, table, write

from lorakit import demo
from lorakit.run import run
from lorakit.widgets.training import Training


def settings(steps: int):
    """Steps alone: no samples and no checkpoints in between."""
    return demo.config(steps=steps, sample_every=steps, sample_steps=1, save_every=steps, validation_share=0.0)


def pace(folder: Path) -> float:
    """Seconds a step, by the log, without the first tenth."""
    from lorakit.run import run_folder

    log = run_folder.read_log(folder / "log.jsonl")
    log = log[len(log) // 10 :]
    return (log[-1]["seconds"] - log[0]["seconds"]) / (len(log) - 1)


def with_panel(steps: int, folder: Path) -> tuple[float, float]:
    """Seconds a step, and the share of the time that the drawing thread computes."""
    panel, used = Training(settings(steps), folder), [0.0]
    refresh = panel.refresh

    def timed() -> None:
        began = time.thread_time()
        refresh()
        used[0] += time.thread_time() - began

    panel.refresh = timed
    began = time.monotonic()
    panel.train()
    return pace(folder), used[0] / (time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    bare, seen, shares = [], [], []
    with tempfile.TemporaryDirectory() as work:
        for number in range(options.rounds):
            bare_folder, panel_folder = Path(work, f"bare-{number}"), Path(work, f"panel-{number}")
            run.start(settings(options.steps), bare_folder, say=lambda _: None, progress=False)
            bare.append(pace(bare_folder))
            each, share = with_panel(options.steps, panel_folder)
            seen.append(each)
            shares.append(share)
    slower = statistics.median(b / a for a, b in zip(bare, seen, strict=True)) - 1
    rows = [
        ["seconds a step without the panel, median", f"{statistics.median(bare):.4f}"],
        ["seconds a step with it, median", f"{statistics.median(seen):.4f}"],
        ["slower by, median of the pairs", f"{slower:+.2%}"],
        ["share of the time that drawing computes, median", f"{statistics.median(shares):.2%}"],
    ]
    figures = {"bare": bare, "panel": seen, "shares": shares}
    write(RESULTS / "drawing", "What the training panel costs", [table(rows, "what", "measured")], figures)


if __name__ == "__main__":
    main()
