"""A headless Chromium: for the tests, and for README's pictures."""

import shutil

from selenium import webdriver


def browser(width: int, height: int, scale: float = 1) -> webdriver.Chrome:
    """A window of that size, with `scale` pixels a point. Without the flags it looks for updates in the network."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
                 "disable-background-networking", "disable-component-update",
                 f"window-size={width},{height}", f"force-device-scale-factor={scale}"):  # fmt: skip
        options.add_argument(f"--{flag}")
    return webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
