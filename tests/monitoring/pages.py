"""A page, read as a browser reads it."""

from html.parser import HTMLParser

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Check that tags nest, and collect text, names, attributes and table rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.names, self.attributes = [], [], []
        self.rows: list[list[str]] = []
        self.feed(text)
        assert self.open == []
        assert len(self.names) == len(set(self.names))

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        self.names += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs
        self.names += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not data.strip() or "style" in self.open:
            return
        self.text.append(" ".join(data.split()))
        if self.open[-1] in ("td", "th"):
            self.rows[-1].append(self.text[-1])

    def row(self, label):
        """Return the cells of the first table row with this heading."""
        return next(row[1:] for row in self.rows if row and row[0] == label)
