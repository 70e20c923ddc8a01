from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.request import urlopen

import pytest
from axe_playwright_python.sync_playwright import Axe
from page_server import Served
from PIL import Image
from playwright.sync_api import Page, expect

SECONDS = 15_000
"""Milliseconds that a slow machine may take for one thing."""
expect.set_options(timeout=SECONDS)


def search(page: Page, text: str) -> None:
    page.fill("#vse-text textarea", text)
    page.keyboard.press("Enter")
    expect(page.locator(".vse-card").first).to_be_visible()


def names(page: Page) -> list[str]:
    return [str(card.get_attribute("data-name")) for card in page.locator(".vse-card").all()]


def test_text_search_shows_cards_with_scores(page: Page, served: Served) -> None:
    search(page, served.captions[3])
    expect(page.locator(".vse-card")).to_have_count(12)
    scores = [float(str(card.get_attribute("data-score"))) for card in page.locator(".vse-card").all()]
    assert scores == sorted(scores, reverse=True)
    expect(page.locator("#vse-said")).to_contain_text("12 results")
    picture = page.locator(".vse-card img").first
    picture.scroll_into_view_if_needed()
    page.wait_for_function("image => image.complete && image.naturalWidth > 0", arg=picture.element_handle())


def test_an_example_is_one_click(page: Page) -> None:
    chip = page.locator(".vse-empty .vse-chip").first
    text = chip.inner_text()
    chip.click()
    expect(page.locator(".vse-card").first).to_be_visible()
    expect(page.locator("#vse-text textarea")).to_have_value(text)


def test_search_by_an_uploaded_picture_finds_the_picture(page: Page, served: Served) -> None:
    page.get_by_role("button", name="With a picture").click()
    page.set_input_files("#vse-picture input[type=file]", str(served.pictures[7]))
    expect(page.locator(".vse-card").first).to_have_attribute("data-name", served.pictures[7].name)


def test_a_broken_upload_is_refused_in_words(page: Page, tmp_path: Path) -> None:
    broken = tmp_path / "holiday.jpg"
    broken.write_text("this is no picture")
    page.get_by_role("button", name="With a picture").click()
    page.set_input_files("#vse-picture input[type=file]", str(broken))
    alert = page.locator("#vse-said [role=alert]")
    expect(alert).to_contain_text("holiday.jpg: not a readable picture")
    assert "/tmp" not in alert.inner_text()


def test_more_like_this_leaves_the_picture_itself_out(page: Page, served: Served) -> None:
    search(page, served.captions[0])
    first = names(page)[0]
    page.locator(".vse-card [data-action=like]").first.click()
    expect(page.locator("#vse-said")).to_contain_text("like item")
    assert first not in names(page)


def test_a_link_leads_back_to_the_search(page: Page, served: Served) -> None:
    search(page, served.captions[5])
    expect(page).to_have_url(re.compile(r"\?text="))
    found = names(page)
    again = page.context.new_page()
    again.goto(page.url)
    expect(again.locator(".vse-card")).to_have_count(12)
    assert names(again) == found
    expect(again.locator("#vse-text textarea")).to_have_value(served.captions[5])


def test_why_shows_a_map_for_each_word(page: Page, served: Served) -> None:
    search(page, served.captions[2])
    page.locator(".vse-card [data-action=why]").first.click()
    why = page.locator("#vse-why section")
    expect(why).to_be_visible()
    expect(why.locator("button[data-word]")).to_have_count(len(served.captions[2].split()) + 1)
    why.locator("button[data-word='1']").click()
    expect(why.locator("img[data-word='1']")).to_be_visible()
    expect(why.locator("img[data-word='-1']")).to_be_hidden()


def test_filter_and_refused_filter(page: Page, served: Served) -> None:
    page.get_by_role("button", name="Filter and options").click()
    page.wait_for_timeout(500)
    page.fill("#vse-where textarea", f"path~*{served.pictures[4].name}")
    search(page, served.captions[4])
    expect(page.locator(".vse-card")).to_have_count(1)
    page.fill("#vse-where textarea", "nonsense")
    page.locator("#vse-search").click()
    expect(page.locator("#vse-said [role=alert]")).to_contain_text("is no condition")


def test_export(page: Page, served: Served) -> None:
    search(page, served.captions[1])
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Export JSON").click()
    rows = json.loads(Path(waiting.value.path()).read_text())
    assert [row["name"] for row in rows] == names(page)
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Export CSV").click()
    assert Path(waiting.value.path()).read_text().splitlines()[0] == "rank,id,score,probability,name,path,caption"


def test_add_and_remove(page: Page, tmp_path: Path) -> None:
    Image.new("RGB", (96, 96), (250, 0, 250)).save(tmp_path / "magenta.png")
    page.get_by_role("button", name="Add pictures to the gallery").click()
    page.set_input_files("#vse-files input[type=file]", str(tmp_path / "magenta.png"))
    page.get_by_label("A sentence about them").fill("nothing but magenta")
    expect(page.locator("#vse-files")).to_contain_text("magenta")
    page.locator("#vse-add-button").click()
    expect(page.locator("#vse-said")).to_contain_text("1 added.")
    page.get_by_role("button", name="With a picture").click()
    page.set_input_files("#vse-picture input[type=file]", str(tmp_path / "magenta.png"))
    first = page.locator(".vse-card").first
    expect(first).to_have_attribute("data-caption", "nothing but magenta")
    page.on("dialog", lambda dialog: dialog.accept())
    first.locator("[data-action=remove]").click()
    expect(page.locator("[data-caption='nothing but magenta']")).to_have_count(0)


def test_a_live_attack_changes_the_rank(page: Page, served: Served) -> None:
    search(page, served.captions[6])
    page.locator(".vse-card [data-action=attack]").first.click()
    expect(page.locator("#vse-chosen img")).to_be_visible()
    page.locator("#vse-epsilon input[type=number]").fill("16")
    page.locator("#vse-epsilon input[type=number]").press("Tab")
    page.locator("#vse-attack").click()
    verdict = page.locator("#vse-attack-said .vse-verdict")
    expect(verdict).to_be_visible(timeout=8 * SECONDS)
    before, after = (int(n.replace(",", "")) for n in re.findall(r"[\d,]+", verdict.inner_text())[:2])
    assert after > before
    expect(page.locator("#vse-ranks table")).to_have_count(2)
    expect(page.locator("#vse-curves svg")).to_have_count(2)
    with page.expect_download() as waiting:
        page.locator("#vse-png").click()
    with Image.open(str(waiting.value.path())) as picture:
        assert (picture.format, picture.size) == ("PNG", (32, 32))


def test_an_attack_needs_a_picture(page: Page) -> None:
    page.get_by_role("tab", name="Robustness").click()
    page.locator("#vse-attack").click()
    expect(page.locator("#vse-attack-said [role=alert]")).to_contain_text("choose a picture first")


def test_model_tab(page: Page) -> None:
    page.get_by_role("tab", name="Model").click()
    expect(page.get_by_role("heading", name="How well it finds")).to_be_visible()
    tables = page.locator("table.vse-table").filter(has=page.get_by_text("picture → caption"))
    expect(tables.first).to_contain_text("test")
    expect(page.locator(".vse-trust")).to_contain_text("14")


def test_the_search_as_a_call_works(page: Page, served: Served) -> None:
    search(page, served.captions[3])
    page.get_by_role("button", name="This search as a call").click()
    command = page.locator("#vse-calls code").first.inner_text()
    assert command.startswith(f"curl '{served.address}search?")
    with urlopen(command.removeprefix("curl '").removesuffix("'")) as answer:
        assert [one["name"] for one in json.load(answer)["results"]] == names(page)


def test_keyboard_alone(page: Page, served: Served) -> None:
    expect(page.locator("#vse-text textarea")).to_be_focused()
    page.keyboard.type(served.captions[8])
    page.keyboard.press("Enter")
    expect(page.locator(".vse-card").first).to_be_visible()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.dataset.action") == "like":
            break
    page.keyboard.press("Enter")
    expect(page.locator("#vse-said")).to_contain_text("like item")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessibility(page: Page, served: Served, theme: str) -> None:
    page.goto(f"{served.address}?__theme={theme}")
    search(page, served.captions[0])
    page.locator(".vse-card [data-action=why]").first.click()
    expect(page.locator("#vse-why section")).to_be_visible()
    for tab in ("Search", "Robustness", "Model"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(500)
        found = Axe().run(page).response["violations"]
        serious = [
            f"{v['id']}: {node['html'][:200]}"
            for v in found
            if v["impact"] in ("serious", "critical")
            for node in v["nodes"]
        ]
        assert not serious, "\n".join([tab, *serious])


def test_a_narrow_screen_does_not_scroll_sideways(page: Page, served: Served) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    search(page, served.captions[0])
    for tab in ("Search", "Robustness", "Model"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, tab
