#!/usr/bin/env python3
"""Makes the two pictures of README.md's first screen from runs of its own: tensorboard.png and report.png.

./e.sh .github/pictures.py      # a minute on 2 cores; needs chromium and chromium-driver
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By

HERE = Path(__file__).resolve().parent
MAIN = HERE.parent / "experiments/tune_lr/main.py"
TAGS = "?tagFilter=%5Eepoch%2F(loss%7Cacc%7Cval_loss%7Cval_acc)%24&smoothing=0#timeseries"
WAIT_SECONDS = 60


def browser(width: int, height: int) -> webdriver.Chrome:
    """A headless Chromium whose pictures have twice as many pixels."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for option in ("--headless=new", "--no-sandbox", "--hide-scrollbars", f"--window-size={width},{height}"):
        options.add_argument(option)
    options.add_argument("--force-device-scale-factor=1.5")
    return webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="pictures.") as name:
        folder = Path(name)
        for command in ("prepare", "run", "report"):
            subprocess.run([MAIN, command, "--size", "small", "--folder", folder], check=True)
        with browser(840, 1010) as driver:
            driver.get((folder / "report/report.html").as_uri())
            driver.save_screenshot(str(HERE / "report.png"))
        board = [sys.executable, "-m", "tensorboard.main", "--logdir", folder / "runs", "--port", "0"]
        server = subprocess.Popen(board, stderr=subprocess.PIPE, text=True)
        try:
            assert server.stderr
            line = next(line for line in server.stderr if "http://" in line)
            address = line[line.index("http://") :].split()[0]
            with browser(1300, 985) as driver:
                driver.get(address + TAGS)
                until = time.monotonic() + WAIT_SECONDS
                while len(driver.find_elements(By.TAG_NAME, "scalar-card")) < 4 and time.monotonic() < until:
                    time.sleep(0.5)
                for button in (".scalars-step-selector input", "[aria-label='Toggle settings side pane']"):
                    driver.find_element(By.CSS_SELECTOR, button).click()  # no tables, no side pane
                time.sleep(5)  # the lines are drawn
                driver.save_screenshot(str(HERE / "tensorboard.png"))
        finally:
            server.terminate()
            server.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
