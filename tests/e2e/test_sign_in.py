"""The link that a start prints makes the page one's own, and other browsers are asked to sign in."""

from __future__ import annotations

import httpx2
from playwright.sync_api import Browser, expect

from tests.e2e.conftest import Served


def test_the_link_signs_one_browser_in_and_the_others_out(browser: Browser, served: Served) -> None:
    assert served.process is not None
    assert served.process.stdout is not None
    link = served.process.stdout.readline().split()[-1]
    assert link.startswith(f"{served.url}/#sign-in=")
    mine, other = browser.new_context(locale="en-GB"), browser.new_context(locale="zh-CN")
    expect.set_options(timeout=20_000)
    try:
        page = mine.new_page()
        page.goto(served.url)
        expect(page.get_by_test_id("composer")).to_be_focused()
        expect(page.get_by_test_id("sign-out")).to_have_count(0)

        page.goto(link)
        expect(page.get_by_test_id("sign-out")).to_be_visible()
        expect(page).to_have_url(f"{served.url}/")  # the token does not stay in the address
        page.get_by_test_id("composer").fill("Hello!")
        page.get_by_test_id("composer").press("Enter")
        expect(page.get_by_test_id("message-assistant")).to_have_attribute("data-status", "complete")
        page.reload()
        expect(page.get_by_test_id("message-assistant")).to_have_count(1)
        assert page.evaluate("document.cookie") == "", "no script can read who one is"

        stranger = other.new_page()
        stranger.goto(link)
        expect(stranger.get_by_test_id("signed-out")).to_contain_text("请先登录")
        expect(stranger.get_by_role("alert")).to_be_visible()
        assert httpx2.get(f"{served.url}/v1/models").status_code == 401

        page.get_by_test_id("sign-out").click()
        expect(page.get_by_test_id("signed-out")).to_contain_text("Please sign in")
    finally:
        expect.set_options(timeout=5_000)
        mine.close()
        other.close()
