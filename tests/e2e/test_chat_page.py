"""A person's first quarter of an hour: three turns, one stopped, one asked again, all there after a reload."""

from __future__ import annotations

import os
from pathlib import Path

from playwright.sync_api import Locator, Page, expect

from tests.e2e.conftest import Served

QUESTION = "Anna is a pilot. She lives in Lyon with her brother Paul.\n\nQuestion: Where does Anna live?"

# Writes down how the newest answer grows while it streams; optionally stops it at its first text.
WATCH = """(stopAtOnce) => {
  window.seen = [];
  window.watcher?.disconnect();
  const before = document.querySelectorAll('[data-testid="message-assistant"]').length;
  window.watcher = new MutationObserver(() => {
    const answers = document.querySelectorAll('[data-testid="message-assistant"]');
    const newest = answers[answers.length - 1];
    if (!newest || newest.dataset.status !== 'streaming') return;
    const length = newest.textContent.trim().length;
    if (length > 0 && window.seen.at(-1) !== length) {
      window.seen.push(length);
      if (stopAtOnce) document.querySelector('[data-testid="stop"]')?.click();
    }
  });
  window.watcher.observe(document.body, { subtree: true, childList: true, characterData: true, attributes: true });
}"""


def send(page: Page, text: str) -> None:
    page.get_by_test_id("composer").fill(text)
    page.get_by_test_id("composer").press("Enter")


def answers(page: Page) -> Locator:
    return page.get_by_test_id("message-assistant")


def wait_for(page: Page, count: int, status: str) -> str:
    """Text of the newest of ``count`` answers, once it has ``status``."""
    expect(answers(page)).to_have_count(count)
    expect(answers(page).last).to_have_attribute("data-status", status)
    return answers(page).last.inner_text()


def picture(page: Page, name: str) -> None:
    """A screenshot for the README, where `make pictures` asks for it."""
    if folder := os.environ.get("GALE_PICTURES"):
        page.screenshot(path=Path(folder) / name)


def test_three_turns_stop_regenerate_and_reload(page: Page, served: Served) -> None:
    page.goto(served.url)
    expect(page.get_by_test_id("composer")).to_be_focused()

    # First turn: tokens are seen arriving one after another.
    page.evaluate(WATCH, False)
    send(page, "Hello! What can you do?")
    first = wait_for(page, 1, "complete")
    seen = page.evaluate("window.seen")
    assert len(seen) >= 3, seen
    assert seen == sorted(seen)
    assert first.strip()

    # Second turn: regenerated; the first answer stays as another branch.
    send(page, QUESTION)
    wait_for(page, 2, "complete")
    page.get_by_test_id("regenerate").last.click()
    expect(page.get_by_test_id("branch-label").last).to_contain_text("2")
    second = wait_for(page, 2, "complete")
    assert second.strip()

    # Third turn: stopped at its first words, which are kept.
    page.evaluate(WATCH, True)
    send(page, "Tell me a long story.")
    wait_for(page, 3, "stopped")

    # Reloaded: the history is still there, in the page and in the sidebar.
    page.reload()
    expect(answers(page)).to_have_count(3)
    expect(answers(page).nth(0)).to_have_text(first)
    expect(answers(page).nth(1)).to_have_text(second)
    expect(answers(page).nth(2)).to_have_attribute("data-status", "stopped")
    expect(answers(page).nth(2)).not_to_be_empty()
    expect(page.get_by_test_id("message-user")).to_have_count(3)
    expect(page.get_by_test_id("conversation-item")).to_have_count(1)
    expect(page.get_by_test_id("conversation-item")).to_contain_text("Hello! What can you do?")

    # Even the server may be started again.
    assert served.stop() == 0
    served.start(port=int(served.url.rsplit(":", 1)[1]))
    page.reload()
    expect(answers(page)).to_have_count(3)


def test_edit_rename_delete_and_languages(page: Page, served: Served) -> None:
    page.goto(served.url)
    send(page, "你好！")
    wait_for(page, 1, "complete")

    page.get_by_test_id("message-user").hover()
    page.get_by_test_id("edit").click()
    page.get_by_test_id("edit-input").fill("你是谁？")
    page.get_by_test_id("edit-save").click()
    expect(page.get_by_test_id("message-user")).to_have_text("你是谁？")
    wait_for(page, 1, "complete")
    page.get_by_test_id("message-user").hover()
    page.get_by_test_id("branch-prev").first.click()
    expect(page.get_by_test_id("message-user")).to_have_text("你好！")

    page.get_by_test_id("conversation-item").hover()
    page.get_by_test_id("conversation-rename").click()
    page.get_by_test_id("conversation-rename-input").fill("第一次聊天")
    page.get_by_test_id("conversation-rename-input").press("Enter")
    expect(page.get_by_test_id("conversation-item")).to_contain_text("第一次聊天")

    page.get_by_test_id("language-toggle").click()
    expect(page.get_by_test_id("new-chat")).to_contain_text("新")
    page.get_by_test_id("theme-toggle").click()
    page.reload()
    expect(page.get_by_test_id("new-chat")).to_contain_text("新")

    page.get_by_test_id("conversation-item").hover()
    page.get_by_test_id("conversation-delete").click()
    page.get_by_test_id("confirm-delete").click()
    expect(page.get_by_test_id("conversation-item")).to_have_count(0)
    expect(answers(page)).to_have_count(0)


def test_pictures_for_the_readme(page: Page, served: Served) -> None:
    page.goto(served.url)
    send(page, "What can you do?")
    wait_for(page, 1, "complete")
    page.get_by_test_id("new-chat").click()
    expect(answers(page)).to_have_count(0)
    send(page, "小明今年八岁，住在杭州，最喜欢吃西瓜。\n\n问题：小明住在哪里？")
    wait_for(page, 1, "complete")
    send(page, "这家图书馆建于1956年，有三层楼，藏书二十万册。\n\n根据以上内容，图书馆建于哪一年？")
    wait_for(page, 2, "complete")
    expect(page.get_by_test_id("conversation-item")).to_have_count(2)
    page.mouse.move(640, 20)
    picture(page, "chat-light.png")
    page.emulate_media(color_scheme="dark")
    picture(page, "chat-dark.png")
