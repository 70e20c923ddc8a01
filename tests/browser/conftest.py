"""A small trained model behind ``vse serve`` in a process of its own, and a real browser cut off from the network."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
from page_server import Served
from playwright.sync_api import Browser, BrowserContext, Page, Route, sync_playwright

from training.data.formats import load_corpus
from vse_app.cli import main

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DATA = "scenes:480"


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine; install Debian's package chromium")
    folder = tmp_path_factory.mktemp("served")
    run, gallery = folder / "run", folder / "scenes"
    main(
        f"train --data {DATA} --out {run} --model.image.encoder small-cnn --model.image.size 32 --model.dim 32 "
        "--model.text.word-dim 16 --model.text.min-count 1 --optim.epochs 8 --optim.batch-size 32 --optim.lr 1e-3 "
        "--augment none --loss.name sum".split()
    )
    main(["evaluate", str(run), "--data", DATA, "--split", "test", "--json", str(run / "test.json")])
    attack = "--queries 6 --threat query-image --epsilons 2/255 8/255 --steps 5"
    main(f"audit {run} --data {DATA} --split test {attack}".split())
    corpus = load_corpus(DATA, "test")
    captions = [corpus.captions[(corpus.owner == n).nonzero()[0][0]] for n in range(24)]
    pictures = [folder / "pictures" / f"{corpus.image_ids[n]}.png" for n in range(24)]
    (folder / "pictures").mkdir()
    for source, path in zip(corpus.images[:24], pictures, strict=True):
        source.load().resize((96, 96)).save(path)
    facts = "\n".join(f'{path},"{caption}"' for path, caption in zip(pictures, captions, strict=True))
    (folder / "facts.csv").write_text(f"image,caption\n{facts}\n")
    main(
        [
            "index",
            str(gallery),
            "add",
            str(folder / "pictures"),
            "--model",
            str(run),
            "--facts",
            str(folder / "facts.csv"),
        ]
    )
    command = [sys.executable, "-m", "vse_app.cli", "serve", str(gallery), "--run", str(run), "--port", "0"]
    with (folder / "log.txt").open("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout
        said = process.stdout.readline()
        found = re.search(r"http://\S+/", said)
        try:
            assert found, said + (folder / "log.txt").read_text()
            yield Served(found[0], captions, pictures)
        finally:
            process.terminate()
            assert process.wait(timeout=20) == 0, "the server did not shut down in peace"
            assert "Traceback" not in (folder / "log.txt").read_text(), (folder / "log.txt").read_text()


@pytest.fixture(scope="module")  # its event loop would be in the way of other tests
def browser(served: Served) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def context(browser: Browser, served: Served) -> Iterator[BrowserContext]:
    """No request leaves this machine: one that tries fails the test."""
    context = browser.new_context(
        viewport={"width": 1280, "height": 900}, permissions=["clipboard-read", "clipboard-write"]
    )
    strays: list[str] = []

    def check(route: Route) -> None:
        if route.request.url.startswith((served.address, "data:", "blob:")):
            route.continue_()
        else:
            strays.append(route.request.url)
            route.abort()

    context.route("**/*", check)
    yield context
    context.close()
    assert not strays, f"the page asks other servers: {strays}"


@pytest.fixture
def page(context: BrowserContext, served: Served) -> Iterator[Page]:
    """The page, just opened; errors in its console fail the test."""
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    page.goto(served.address)
    page.wait_for_selector("#vse-text textarea")
    yield page
    assert not problems, problems
