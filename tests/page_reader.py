"""What a page says to who reads it, and text that a page must not take for its own."""

from __future__ import annotations

from html.parser import HTMLParser

HOSTILE = (
    "</style></details><script>window.owned = 1</script>",
    "<img src=x onerror='window.owned = 1'>",
    "{{ 7 * 7 }} {% raw %} &lt;b&gt; ' \" ` ${1}",
    "\u2028\x00\ud800\u202eabc\x1b[31m\r\n",
)


class Reader(HTMLParser):
    """Tags in order, and what a reader sees."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[dict[str, str | None]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.append(dict(attrs))

    def handle_data(self, data: str) -> None:
        self.text += data
