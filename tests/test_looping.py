"""Replies that repeat themselves."""

from hypothesis import given
from hypothesis import strategies as st

from weightsteer.looping import loops, repeated_share

FLUENT = "A beautiful spring is a wonderful time to have a garden. You'll be surrounded by colours and a good smell."


@given(st.lists(st.text("abc", min_size=1), max_size=12, unique=True))
def test_words_that_differ_repeat_nothing(words: list[str]) -> None:
    assert repeated_share(" ".join(words)) == 0


@given(st.integers(5, 40))
def test_one_word_again_and_again(times: int) -> None:
    assert repeated_share("no " * times) == 1 - 1 / (times - 3)


@given(st.text())
def test_any_text_has_a_share(text: str) -> None:
    assert 0 <= repeated_share(text) < 1


def test_a_reply_that_ends_in_a_loop() -> None:
    assert not loops(FLUENT)
    assert loops(FLUENT + " I am sure that it is fine." * 5)
    assert loops("".join(["我们走吧"] * 6))
    assert not loops("我们走吧,今天天气很好")
