"""What the tests of pages share."""

from html.parser import HTMLParser

import pytest


class Seen(HTMLParser):
    """A page's tags and texts, in their order."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        self.text.append(" ".join(data.split()))


@pytest.fixture(scope="session")
def read_page():
    """read_page(path) -> what is `Seen` in a page, which runs nothing and fetches nothing."""

    def read(path):
        page = path.read_text()
        seen = Seen(page)
        assert not {"script", "link", "iframe", "object"} & set(seen.tags) and "url(http" not in page
        assert all(address.startswith(("#", "data:")) for address in seen.addresses)
        return seen

    return read
