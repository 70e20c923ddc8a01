"""Photograph the page: python docs/serving/take_screenshots.py ADDRESS TEXT; needs a system Chromium."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

HERE = Path(__file__).parent
SCREENS = {"desktop": ({"width": 1280, "height": 900}, "light"), "phone": ({"width": 390, "height": 844}, "dark")}
PATIENCE = 180_000  # milliseconds


def photograph(browser: Browser, server: str, text: str, screen: str) -> None:
    """One picture of each tab."""
    size, theme = SCREENS[screen]
    page = browser.new_context(viewport=size).new_page()  # type: ignore[arg-type]
    page.set_default_timeout(PATIENCE)
    page.goto(f"{server}?__theme={theme}")
    page.fill("#vse-text textarea", text)
    page.keyboard.press("Enter")
    page.locator(".vse-card [data-action=why]").first.click()
    page.wait_for_selector("#vse-why section")
    save(page, f"search_{screen}")
    page.locator(".vse-card [data-action=attack]").first.click()
    page.wait_for_selector("#vse-chosen img")
    page.click("#vse-attack")
    page.wait_for_selector(".vse-verdict")
    save(page, f"robustness_{screen}")
    page.get_by_role("tab", name="Model").click()
    save(page, f"model_{screen}")


def save(page: Page, name: str) -> None:
    """What a visitor sees, and what scrolling down would show, up to three screens."""
    page.wait_for_timeout(1500)
    size = page.viewport_size
    assert size
    tall = min(3 * size["height"], int(page.evaluate("document.documentElement.scrollHeight")))
    page.screenshot(
        path=HERE / f"{name}.png", full_page=True, clip={"x": 0, "y": 0, "width": size["width"], "height": tall}
    )


if __name__ == "__main__":
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for screen in SCREENS:
            photograph(chromium, sys.argv[1], sys.argv[2], screen)
