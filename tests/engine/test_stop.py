"""Stop strings, wherever the text is cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gale.engine.stop import StopScanner

letters = st.text("ab。", max_size=30)


@given(pieces=st.lists(letters, max_size=10), stops=st.lists(st.text("ab。", min_size=1, max_size=4), max_size=3))
def test_exactly_what_stands_before_the_first_stop_is_shown(pieces: list[str], stops: list[str]) -> None:
    scanner = StopScanner(tuple(stops))
    shown = ""
    for piece in pieces:
        shown += scanner.push(piece)
        assert not any(stop in shown for stop in stops)
        if scanner.stopped:
            break
    else:
        shown += scanner.flush()
    whole = "".join(pieces)
    places = [whole.find(stop) for stop in stops if stop in whole]
    if not places:
        assert (shown, scanner.stopped) == (whole, False)
    else:
        assert scanner.stopped
        assert whole.startswith(shown)
        assert any(whole[len(shown) :].startswith(stop) for stop in stops)


def test_text_that_can_be_no_stop_is_shown_at_once() -> None:
    scanner = StopScanner(("END",))
    assert scanner.push("fine, E") == "fine, "
    assert scanner.push("V") == "EV"
