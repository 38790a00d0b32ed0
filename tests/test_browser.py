"""Tests the site in Chromium: all pages at two widths, the search, both palettes.

Each check is a function that takes a page and returns a list of problems. Each check is
also tested on a page that has the problem.
"""

import functools as ft
import html.parser
import http.server
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest


ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("playwright", "mkdocs", "material", "mkdocstrings_handlers", "latex2mathml")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# These are the only skips in the test suite. The test command in the README installs
# neither the packages for the site nor a browser, and some machines do not permit us to
# install a browser. `.ci/run` installs both. There, it is an error if the whole file is
# skipped (pytest's exit code 5).
if MISSING:
    reason = f'needs {", ".join(MISSING)}: pip install -e ".[browser,docs]"'
    pytest.skip(reason, allow_module_level=True)
if CHROMIUM is None:
    pytest.skip("needs Chromium: apt-get install chromium", allow_module_level=True)

import jinja2  # noqa: E402
from playwright.sync_api import (  # noqa: E402
    Browser,
    BrowserContext,
    Page,
    sync_playwright,
)


pytestmark = pytest.mark.browser
WIDTHS = {"desktop": 1400, "phone": 390}
WORDS = re.compile("weight decay", re.IGNORECASE)


#
# Checks: each one returns the problems of a page
#


def overflow(page: Page) -> list[str]:
    """Content that makes the page wider than its window."""
    found: list[str] = page.evaluate(
        """() => {
            const root = document.scrollingElement, width = root.clientWidth
            if (root.scrollWidth <= width) return []
            const clips = e => getComputedStyle(e).overflowX !== "visible"
            const scrolls = e => e && e !== root && e !== document.body &&
                (clips(e) || scrolls(e.parentElement))
            const wide = e => e.getBoundingClientRect().right > width + 0.5
            const all = [...document.body.querySelectorAll("*")]
            const found = all.filter(e => wide(e) && !scrolls(e))
            return [`${root.scrollWidth} > ${width}`, ...found.map(e => e.outerHTML)]
        }"""
    )
    return [text[:200] for text in found[:4]]


def scrolling(page: Page, parts: str = "*") -> list[str]:
    """Parts of an article that must be scrolled sideways, such as long signatures."""
    found: list[str] = page.evaluate(
        """parts => {
            const scrolls = e => ["auto", "scroll"].includes(
                getComputedStyle(e).overflowX) && e.scrollWidth > e.clientWidth + 1
            const all = [...document.querySelectorAll(`article ${parts}`)]
            return all.filter(scrolls).map(e => e.textContent)
        }""",
        parts,
    )
    return [text[:200] for text in found]


def images_without_text(page: Page) -> list[str]:
    return page.evaluate(
        """() => [...document.images].filter(e => !e.alt.trim()).map(e => e.outerHTML)
        """
    )


def broken_images(page: Page) -> list[str]:
    return page.evaluate(
        """async () => {
            const images = [...document.images]
            const broken = e => e.decode().then(() => null, () => e.outerHTML)
            images.forEach(e => { e.loading = "eager" })
            return (await Promise.all(images.map(broken))).filter(e => e)
        }"""
    )


def unrendered_mathematics(page: Page) -> list[str]:
    """LaTeX source that is still visible outside of code."""
    spans: list[str] = page.evaluate(
        """() => [...document.querySelectorAll(".arithmatex")]
            .filter(e => !e.querySelector("math")).map(e => e.outerHTML)"""
    )
    formulas: list[str] = page.evaluate(
        """() => [...document.querySelectorAll("math")]
            .filter(e => e.textContent.includes("\\\\") || e.querySelector("merror"))
            .map(e => e.textContent)"""
    )
    text: str = page.evaluate(
        """() => {
            const body = document.body.cloneNode(true)
            const others = "pre, code, script, style, math, template"
            body.querySelectorAll(others).forEach(e => e.remove())
            return body.textContent
        }"""
    )
    pattern = r"\$\$|\\[()\[\]]|\\begin\{|\$[^\s$][^$\n]*\$"
    return spans + formulas + re.findall(pattern, text)


def broken_links(page: Page, site: pathlib.Path) -> list[str]:
    """Links to files or anchors that do not exist in the site."""
    hrefs: list[str] = page.evaluate(
        "() => [...document.querySelectorAll('a[href]')].map(e => e.href)"
    )
    here = urllib.parse.urlsplit(page.url)
    links = [urllib.parse.urlsplit(href) for href in dict.fromkeys(hrefs)]
    return [
        link.geturl()
        for link in links
        if link.netloc == here.netloc and not _leads_somewhere(link, site)
    ]


def _leads_somewhere(link: urllib.parse.SplitResult, site: pathlib.Path) -> bool:
    path = site / urllib.parse.unquote(link.path).lstrip("/")
    path = path / "index.html" if path.is_dir() else path
    fragment = urllib.parse.unquote(link.fragment)
    return path.is_file() and (not fragment or fragment in _anchors(path))


@ft.cache
def _anchors(path: pathlib.Path) -> set[str]:
    parser = _Anchors()
    parser.feed(path.read_text())
    return parser.found


class _Anchors(html.parser.HTMLParser):
    """Collects all targets that a URL fragment can refer to."""

    def __init__(self):
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]):
        names = ("id", "name") if tag == "a" else ("id",)
        self.found |= {value for name, value in attrs if name in names and value}


def search_results(page: Page, words: str) -> list[str]:
    """The results that the site's search box finds."""
    if not page.locator("[data-md-component=search-query]").is_visible():
        page.locator("label.md-header__button[for=__search]").click()
    box = page.locator("[data-md-component=search-query]")
    box.fill("")
    box.press_sequentially(words)
    meta = page.locator(".md-search-result__meta")
    # "Initializing search", then "Type to start searching", then the result count.
    page.wait_for_function(
        "e => /matching document/.test(e.textContent)", arg=meta.element_handle()
    )
    return page.locator(".md-search-result__item").all_inner_texts()


def palette(page: Page) -> tuple[str | None, str]:
    """The name of the palette, and the background color of the page."""
    background = "() => getComputedStyle(document.body).backgroundColor"
    name = page.locator("body").get_attribute("data-md-color-scheme")
    return name, page.evaluate(background)


def toggle(page: Page) -> None:
    """Switches to the other palette in the same way as a reader."""
    page.locator("[data-md-component=palette] label:visible").click()


#
# Pages
#


class Site(NamedTuple):
    """A folder of pages, and the address where it is served."""

    folder: pathlib.Path
    address: str

    @property
    def pages(self) -> list[str]:
        paths = sorted(self.folder.glob("**/*.html"))
        return [path.relative_to(self.folder).as_posix() for path in paths]


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder without logging."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[[pathlib.Path], Site]]:
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(folder: pathlib.Path) -> Site:
        handler = ft.partial(Quiet, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return Site(folder, f"http://127.0.0.1:{server.server_port}")

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def site(
    serve: Callable[[pathlib.Path], Site], tmp_path_factory: pytest.TempPathFactory
) -> Site:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return serve(folder)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser, width: str) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": WIDTHS[width], "height": 900})
    yield context
    context.close()


@pytest.fixture
def width() -> str:
    return "desktop"


class Visit(NamedTuple):
    """An open page, and the problems that occurred while it was opened."""

    page: Page
    problems: list[str]


def visit(context: BrowserContext, address: str) -> Visit:
    """Opens a page. Blocks requests to other hosts and reports them as problems."""
    page, problems = context.new_page(), []
    origin = "{0.scheme}://{0.netloc}/".format(urllib.parse.urlsplit(address))
    own = (origin, "data:", "blob:")

    def route(route: Any) -> None:
        if route.request.url.startswith(own):
            route.continue_()
        else:
            problems.append(f"foreign request: {route.request.url}")
            route.abort()

    def on_console(message: Any) -> None:
        if message.type in ("error", "warning"):
            problems.append(f"console: {message.text}")

    def on_response(response: Any) -> None:
        if response.status >= 400:
            problems.append(f"failed request: {response.status} {response.url}")

    page.route("**/*", route)
    page.on("console", on_console)
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on("response", on_response)
    page.on("requestfailed", lambda r: problems.append(f"failed request: {r.url}"))
    page.goto(address, wait_until="networkidle")
    return Visit(page, problems)


def problems_of(found: Visit, site: Site) -> list[str]:
    page = found.page
    return [
        *found.problems,
        *(f"wider than the window: {x}" for x in overflow(page)),
        *(f"image without text: {x}" for x in images_without_text(page)),
        *(f"broken image: {x}" for x in broken_images(page)),
        *(f"not rendered: {x}" for x in unrendered_mathematics(page)),
        *(f"broken link: {x}" for x in broken_links(page, site.folder)),
    ]


# The folder for screenshots of all pages in both palettes, if you want them. They take
# more time than the checks.
SCREENSHOTS = os.environ.get("EQX_ADEMAMIX_SCREENSHOTS")


def take_screenshots(page: Page, start: str) -> None:
    """In both palettes. Their paths begin with `start`."""
    for _ in range(2):
        path = f"{start}-{palette(page)[0]}.png"
        page.screenshot(path=path, full_page=True, animations="disabled")
        toggle(page)


SOURCES = sorted((ROOT / "docs").glob("**/*.md"))
NAMES = [path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in SOURCES]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["404", *NAMES])
def test_page(site: Site, context: BrowserContext, name: str, width: str):
    found = visit(context, f"{site.address}/{name}.html")
    problems = problems_of(found, site)
    if width == "desktop":
        # Elsewhere, the output of an example may be wide.
        parts = "*" if name.startswith("api/") else ".md-typeset__scrollwrap"
        problems += [f"scrolls: {x}" for x in scrolling(found.page, parts)]
    if SCREENSHOTS:
        start = f"{SCREENSHOTS}/{name.replace('/', '-')}-{width}"
        take_screenshots(found.page, start)
    assert problems == []


def test_all_pages_are_tested(site: Site):
    assert site.pages == sorted(f"{name}.html" for name in ["404", *NAMES])


@pytest.mark.parametrize("width", WIDTHS)
def test_search(site: Site, context: BrowserContext, width: str):
    page, problems = visit(context, f"{site.address}/index.html")
    results = search_results(page, WORDS.pattern)
    assert any(WORDS.search(text) for text in results)
    link = page.locator(".md-search-result__link:visible", has_text=WORDS).first
    with page.expect_navigation():
        link.click()
    assert WORDS.search(page.locator("article").inner_text())
    assert problems == []


@pytest.mark.parametrize(
    ("words", "name"),
    (
        ("tensorboard", "watching.html"),
        ("wandb", "watching.html"),
        ("gradient accumulation", "many-devices.html"),
        ("checkpoint", "resuming.html"),
        ("ZeRO", "many-devices.html"),
        ("mixed precision", "precision.html"),
    ),
)
def test_search_finds_the_page(
    site: Site, context: BrowserContext, words: str, name: str
):
    page, _ = visit(context, f"{site.address}/index.html")
    search_results(page, words)
    links = page.locator(".md-search-result__link:visible")
    first = [links.nth(i).get_attribute("href") for i in range(2)]
    assert any(name in str(link) for link in first), first


def test_search_in_files(site: Site, context: BrowserContext):
    """The site also works from a folder, without a server."""
    page, problems = visit(context, (site.folder / "index.html").as_uri())
    assert any(WORDS.search(text) for text in search_results(page, WORDS.pattern))
    assert problems == []


def test_search_can_find_nothing(site: Site, context: BrowserContext):
    page, _ = visit(context, f"{site.address}/index.html")
    assert search_results(page, "xyzzy") == []


@pytest.mark.parametrize("width", WIDTHS)
def test_palettes(site: Site, context: BrowserContext, width: str):
    page, _ = visit(context, f"{site.address}/index.html")
    first = palette(page)
    toggle(page)
    second = palette(page)
    assert first[0] != second[0] and first[1] != second[1]
    page.reload(wait_until="networkidle")
    assert palette(page) == second  # the site remembers it
    toggle(page)
    assert palette(page) == first


#
# The checks find the right problems, and nothing else
#


DOT = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="
GOOD = f"""<!doctype html><html lang="en"><link rel="icon" href="data:,"><body>
<p id="there">A price of $5, <code>$x$ and \\(x\\)</code>.</p>
<p><span class="arithmatex"><math><mi>x</mi></math></span></p>
<img alt="A dot." src="{DOT}">
<a href="#there">here</a> <a href="page.html#there">here</a> <a href="/">start</a>
%s</body></html>"""
PROBLEMS = {
    "overflow": ("<div style='width: 2000px'>wide</div>", "wider than the window"),
    "no alt": (f"<img src='{DOT}'>", "image without text"),
    "empty alt": (f"<img alt=' ' src='{DOT}'>", "image without text"),
    "image": ("<img alt='x' src='data:image/png;base64,AAAA'>", "broken image"),
    "dollars": ("<p>$$x$$</p>", "not rendered"),
    "dollar": ("<p>$x$</p>", "not rendered"),
    "parentheses": (r"<p>\(x\)</p>", "not rendered"),
    "brackets": (r"<p>\[x\]</p>", "not rendered"),
    "environment": (r"<p>\begin{align}</p>", "not rendered"),
    "arithmatex": ("<p class='arithmatex'>x</p>", "not rendered"),
    "macro": (r"<math><mi>\nonsense</mi></math>", "not rendered"),
    "anchor": ("<a href='#nowhere'>x</a>", "broken link"),
    "anchor elsewhere": ("<a href='page.html#nowhere'>x</a>", "broken link"),
    "page": ("<a href='nowhere.html'>x</a>", "broken link"),
    "console": ("<script>console.error('no')</script>", "console: no"),
    "warning": ("<script>console.warn('oh')</script>", "console: oh"),
    "exception": ("<script>throw Error('no')</script>", "error: no"),
    "missing": ("<script src='nowhere.js'></script>", "failed request: 404"),
    "foreign": ("<script src='https://example.org/x.js'></script>", "foreign request"),
    "font": (
        "<style>@font-face{font-family:f;src:url(https://example.org/f)}</style>"
        "<p style='font-family:f'>x</p>",
        "foreign request",
    ),
}


def visit_html(text: str, serve: Any, context: BrowserContext, folder: Any) -> Any:
    site = serve(folder)
    (folder / "index.html").write_text(text)
    (folder / "page.html").write_text(GOOD % "")
    return visit(context, f"{site.address}/index.html"), site


def test_good_page_has_no_problems(serve, context, tmp_path):
    found = visit_html(GOOD % "", serve, context, tmp_path)
    assert problems_of(*found) == []


@pytest.mark.parametrize("content, problem", PROBLEMS.values(), ids=PROBLEMS)
def test_problems_are_found(content: str, problem: str, serve, context, tmp_path):
    problems = problems_of(*visit_html(GOOD % content, serve, context, tmp_path))
    assert problems and any(text.startswith(problem) for text in problems)


def test_scrolling_is_seen(serve, context, tmp_path):
    text = "<article><pre style='overflow: auto; width: 100px'>%s</pre></article>"
    page, _ = visit_html(text % "short", serve, context, tmp_path)[0]
    assert scrolling(page) == []
    page, _ = visit_html(text % ("long " * 100), serve, context, tmp_path)[0]
    assert len(scrolling(page)) == 1


def test_a_toggle_that_does_nothing_is_seen(serve, context, tmp_path):
    text = "<form data-md-component='palette'><label>toggle</label></form>"
    (page, _), _ = visit_html(GOOD % text, serve, context, tmp_path)
    before = palette(page)
    toggle(page)
    assert palette(page) == before


#
# The card that other sites show beside a link
#


def card(repository: str | None, page: object) -> dict[str, str]:
    """The properties in the head of a page."""
    theme = (ROOT / "docs/_theme/main.html").read_text()
    base = "{% block extrahead %}{% endblock %}"
    loader = jinja2.DictLoader({"main.html": theme, "base.html": base})
    config = {"repo_url": repository, "site_name": "site", "site_description": "usual"}
    template = jinja2.Environment(loader=loader).get_template("main.html")
    head = template.render(config=config, page=page)
    return dict(re.findall(r'<meta property="og:(.*?)" content="(.*?)">', head))


def test_card():
    """The card links to its image with an absolute URL, so a site without a repository
    URL has no card."""
    page = {"title": "Guards", "meta": {"description": "Three options."}}
    properties = card("https://example.org/o/r", page)
    assert properties["title"] == "Guards - site"
    assert properties["description"] == "Three options."
    address, image = properties["image"].split("/raw/main/")
    assert address == "https://example.org/o/r" and (ROOT / image).is_file()
    assert card("https://example.org/o/r", {"meta": {}})["description"] == "usual"
    for nothing in (card(None, page), card("https://example.org/o/r", None)):
        assert nothing == {}
