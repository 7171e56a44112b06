"""The text of a page of HTML: what a reader sees, blocks on lines of their own."""

import re
from html.parser import HTMLParser

SILENT = {"script", "style", "template", "noscript", "svg", "iframe"}
PARAGRAPHS = {
    *("p", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "blockquote", "ul", "ol", "dl", "table", "figure", "hr", "title", "form"),
    *("article", "section", "header", "footer", "main", "aside", "nav"),
}
LINES = {"div", "li", "tr", "dt", "dd", "caption", "figcaption", "address", "option"}
CELLS = {"td", "th"}
SPACE = re.compile(r"[ \t\n\r\f]+")
OPEN = re.compile(r"<[A-Za-z/!?]")


class Text(HTMLParser):
    """Collects text, with line ends where blocks begin and end."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.silent: list[str] = []  # elements around whose text is not shown
        self.preformatted = 0  # elements around that keep their spaces

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in SILENT:
            self.silent.append(tag)
        self.preformatted += tag == "pre"
        self.end_block(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.end_block(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.silent:
            while self.silent.pop() != tag:
                pass
        self.preformatted = max(0, self.preformatted - (tag == "pre"))
        if tag in CELLS:
            self.parts.append("\t")
        self.end_block(tag)

    def handle_data(self, data: str) -> None:
        if self.silent:
            return
        if not self.preformatted:
            data = SPACE.sub(" ", data)
            if not self.parts or self.parts[-1].endswith((" ", "\t", "\n")):
                data = data.removeprefix(" ")
        if data:
            self.parts.append(data)

    def end_block(self, tag: str) -> None:
        if tag in PARAGRAPHS:
            self.parts.append("\n\n")
        elif tag == "br" or (tag in LINES and self.parts and not self.parts[-1].endswith("\n")):
            self.parts.append("\n")


def text_of(html: str) -> str:
    """Text with an empty line between paragraphs, without scripts and styles; "" if there is none."""
    parser = Text()
    parser.feed(html)
    if not OPEN.match(parser.rawdata):  # a tag or comment that never ends shows nothing, and would be looked through from each "<"
        parser.close()
    text = re.sub(r"(?<![ \t])[ \t]+\n", "\n", "".join(parser.parts))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
