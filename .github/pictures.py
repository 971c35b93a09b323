#!/usr/bin/env python3
"""Makes the two pictures of README.md's first screen from runs of its own: tensorboard.png and report.png.

./e.sh .github/pictures.py      # a minute on 2 cores; needs chromium and chromium-driver
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from src.config import ROOT
from tests.browser import browser

HERE = ROOT / ".github"
TAGS = "?tagFilter=%5Eepoch%2F(loss%7Cacc%7Cval_loss%7Cval_acc)%24&smoothing=0#timeseries"
SCALE = 1.5  # pixels a point


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="pictures.") as name:
        folder = Path(name)
        for command in ("prepare", "run", "report"):
            subprocess.run(
                [ROOT / "experiments/tune_lr/main.py", command, "--size", "small", "--folder", folder], check=True
            )
        with browser(840, 1010, SCALE) as driver:
            driver.get((folder / "report/report.html").as_uri())
            driver.execute_script("document.documentElement.style.overflow = 'hidden'")  # no scroll bar
            driver.save_screenshot(str(HERE / "report.png"))
        board = [sys.executable, "-m", "tensorboard.main", "--logdir", folder / "runs", "--port", "0"]
        server = subprocess.Popen(board, stderr=subprocess.PIPE, text=True)
        try:
            assert server.stderr
            line = next(line for line in server.stderr if "http://" in line)
            address = line[line.index("http://") :].split()[0]
            with browser(1300, 985, SCALE) as driver:
                driver.get(address + TAGS)
                WebDriverWait(driver, 60).until(lambda d: len(d.find_elements(By.TAG_NAME, "scalar-card")) == 4)
                for button in (".scalars-step-selector input", "[aria-label='Toggle settings side pane']"):
                    driver.find_element(By.CSS_SELECTOR, button).click()  # no tables, no side pane
                time.sleep(5)  # the lines are drawn
                driver.save_screenshot(str(HERE / "tensorboard.png"))
        finally:
            server.terminate()
            server.wait()
    for name in ("report.png", "tensorboard.png"):
        with Image.open(HERE / name) as picture:
            picture.convert("RGB").quantize(64, Image.Quantize.FASTOCTREE).save(HERE / name, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
