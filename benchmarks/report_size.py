"""How large the report of many long runs is, how long it takes to write, and how soon it opens.

    python benchmarks/report_size.py [--runs 500] [--lines 500]

The runs are made up: 10 arms, 10 learning rates, 5 seeds, with spikes and alarms; of 10,000 steps every 20th is
logged. Chromium opens the page; "opens" is from the start of the load to the first chart, from when on the page can be
read and scrolled. Writes results/report_size.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from measure import RESULTS, machine, spread

from trimtab.report.collect import collect
from trimtab.report.compare_page import write_collection

ARMS = ["none", *(f"stabilizer-{index}" for index in range(1, 10))]
LRS = np.geomspace(1e-4, 1e-1, 10)
EVERY = 20
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--lines", type=int, default=500)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, page = Path(place) / "compare", Path(place) / "report.html"
        cells = list(product(range(5), LRS, ARMS))[: options.runs]
        for seed, lr, arm in cells:
            write_run(folder / "runs" / arm / f"lr{lr:g}-seed{seed}", arm, float(lr), seed, options.lines)
        log = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        start = time.perf_counter()
        collection = collect([folder])
        read = time.perf_counter() - start
        start = time.perf_counter()
        write_collection(collection, page)
        written = time.perf_counter() - start
        size = page.stat().st_size
        opened = [seconds_to_open(page, Path(place)) for _ in range(5)]
    print(f"{len(cells)} runs of {options.lines:,} logged steps, {log / 1e6:,.0f} MB of logs")
    print(f"read in {read:.1f} s, page written in {written:.1f} s, {size / 1e6:.1f} MB")
    first, last = ([pair[index] for pair in opened if pair] for index in (0, 1))
    if first:
        print(f"opens in {spread(first)} s, all charts stand after {spread(last)} s")
    else:
        print("no Chromium here: how soon it opens was not measured")
    result = {
        "machine": machine(),
        "runs": len(cells),
        "lines": options.lines,
        "log_bytes": log,
        "read_seconds": read,
        "write_seconds": written,
        "page_bytes": size,
        "first_chart_seconds": first,
        "all_charts_seconds": last,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "report_size.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if size > 20e6 or (first and median(first) > 3):
        sys.exit("the page is larger than 20 MB or takes more than 3 s to open")


def write_run(folder: Path, arm: str, lr: float, seed: int, lines: int) -> None:
    """A run folder as `trimtab compare` leaves it: loss, entropy and logits get worse with the learning rate."""
    folder.mkdir(parents=True)
    place = ARMS.index(arm)
    rng = np.random.default_rng([place, seed, round(lr * 1e7)])
    steps = np.arange(1, lines + 1)
    bad = max(0.0, np.log10(lr / 1e-3)) / (1 + place / 3)
    loss = 2 * np.exp(-6 * steps / lines) + 0.1 + 0.3 * bad**2 + 0.05 * rng.random(lines)
    loss[rng.integers(lines // 2, lines, size=3)] += 3  # spikes
    entropy = np.clip(0.9 - 0.4 * bad * steps / lines + 0.02 * rng.random(lines), 0, 1)
    logit = 10 + 1000 * bad * steps / lines + rng.random(lines)
    recipe = {"stabilizer": arm, "lr": lr, "seed": seed, "data": "synthetic", "steps": lines * EVERY, "batch_size": 64}
    write(folder / "run.json", {"format": 1, "task": "Synthetic", "arm": arm, "recipe": recipe, "trimtab": "0.1.0"})
    message = "The loss of step 1 stood far above those before it. " * 6
    with (folder / "steps.jsonl").open("w", encoding="utf-8") as file:
        for step in range(lines):
            line = {
                "step": (step + 1) * EVERY,
                "loss": round(float(loss[step]), 6),
                "lr": lr,
                "grad_norm": 1 + step % 7 / 10,
            }
            line |= {"entropy_min": round(float(entropy[step]), 6), "entropy_mean": 2.5}
            line |= {"max_logit": round(float(logit[step]), 4), "alarms": []}
            if loss[step] > 3 and step > lines // 2:
                line["alarms"] = [
                    {"step": (step + 1) * EVERY, "kind": "loss spike", "where": "loss", "message": message}
                ]
            if step % 5 == 4:
                line |= {"accuracy": round(1 - float(loss[step]) / 4, 4), "eval_loss": round(float(loss[step]), 4)}
            file.write(json.dumps(line | {"time": step / 100}) + "\n")
    metrics = {"accuracy": 1 - float(loss[-1]) / 4, "eval_loss": float(loss[-1])}
    result = {"status": "finished", "steps": lines * EVERY, "loss": float(loss[-1]), "metric": "accuracy"}
    result |= {"higher_is_better": True, "initial": {"accuracy": 0.1, "eval_loss": 2.3}, "metrics": metrics}
    write(folder / "result.json", result | {"step_seconds": 0.01 + 0.001 * place, "peak_memory_bytes": 500_000_000})


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def seconds_to_open(page: Path, place: Path) -> tuple[float, float] | None:
    """From the start of the load to the first chart and to the last, by the page's clock; None without Chromium."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        return None
    clocked = place / "clocked.html"
    clock = (
        "<script>const at = []; document.addEventListener('drawn', () => at.push(performance.now() / 1000));</script>"
    )
    clocked.write_text(page.read_text(encoding="utf-8").replace("</main>", f"</main>{clock}"), encoding="utf-8")
    with tempfile.TemporaryDirectory() as profile, Chromium(browser, profile) as chromium:
        target = chromium.ask("Target.createTarget", url=clocked.as_uri())["targetId"]
        session = chromium.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        question = "typeof at === 'undefined' || waiting.length ? '' : at[0] + ' ' + at.at(-1)"
        while not (
            found := chromium.ask("Runtime.evaluate", session, expression=question).get("result", {}).get("value")
        ):
            time.sleep(0.1)
    first, last = map(float, found.split())
    return first, last


class Chromium:
    """A headless Chromium that is spoken to over pipes, in the DevTools protocol."""

    def __init__(self, browser: str, profile: str) -> None:
        their_in, our_out = os.pipe()
        our_in, their_out = os.pipe()
        words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(
            # it reads from descriptor 3 and writes to 4
            ["sh", "-c", f'exec "$@" 3<&{their_in} 4>&{their_out}', "sh", *words, "--remote-debugging-pipe"],
            pass_fds=(their_in, their_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_in)
        os.close(their_out)
        self.out, self.answers, self.asked = os.fdopen(our_out, "wb"), os.fdopen(our_in, "rb"), 0

    def __enter__(self) -> "Chromium":
        return self

    def __exit__(self, *error: object) -> None:
        self.out.close()
        self.process.terminate()
        self.process.wait()
        self.answers.close()

    def ask(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; what else the browser tells is passed over."""
        self.asked += 1
        command = {"id": self.asked, "method": method, "params": params} | ({"sessionId": session} if session else {})
        self.out.write(json.dumps(command).encode() + b"\0")
        self.out.flush()
        while True:
            text = b""
            while not text.endswith(b"\0"):
                text += self.answers.read(1) or sys.exit("Chromium ended")
            answer = json.loads(text[:-1])
            if answer.get("id") == self.asked:
                return dict(answer.get("result", {}))


if __name__ == "__main__":
    main()
