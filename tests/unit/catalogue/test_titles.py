"""Titles as people read them, and those that nobody can read."""

import html

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.catalogue.titles import has_text, readable_title


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("AT&amp;T 5&#34; caf&eacute;", 'AT&T 5" café'),
        ("a &amp;amp;amp; b", "a & b"),
        ("&#x2728; &lt;b&gt; &quot;x&quot; it&#39;s", '✨ <b> "x" it\'s'),
        ("salt&pepper food&region R&D;D", "salt&pepper food&region R&D;D"),
        ("&nosuch; &#xZZ; &notit;", "&nosuch; &#xZZ; &notit;"),
        ("iPhone\u200b 12\ufeff \u200ered\u00ad", "iPhone 12 red"),
        ("می\u200cخواهم 👩\u200d🔧", "می\u200cخواهم 👩\u200d🔧"),
        ("caf\\xc3\\xa9 &amp; \\xe2\\x80\\x8b", "café & "),
        ("&#0;", "\ufffd"),
    ],
)  # fmt: skip
def test_titles_are_decoded(title: str, expected: str) -> None:
    assert readable_title(title) == expected


@given(st.text(alphabet="ab<>&\"';#x1 é✨", max_size=30))
def test_an_escaped_title_reads_as_the_title_itself(title: str) -> None:
    assert readable_title(html.escape(title)) == readable_title(title)
    assert readable_title(html.escape(html.escape(title))) == readable_title(title)


@pytest.mark.parametrize(
    "title",
    ["", "  \t", "\u200b", "\u200b\u200d\ufeff", "\u2060 \u00a0", "\u3164", "\u2800", "&nbsp;",
     "&#8203;", "\\xe2\\x80\\x8b", "\x00\x1f", "\u00ad", "\ufe0f", "&amp;nbsp;", "\u202e\u061c"],
)  # fmt: skip
def test_a_title_without_anything_to_see_is_none(title: str) -> None:
    assert not has_text(title)


@pytest.mark.parametrize(
    "title", ["a", "✨", "-", "0", "é", "靴", "\u200ba", "ก็", "&amp;", "👩\u200d🔧"]
)
def test_a_title_with_something_to_see_is_one(title: str) -> None:
    assert has_text(title)
