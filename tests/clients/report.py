"""Drives the HTML report of a sweep in Chromium, as a reader would.

    pip install playwright     # no `playwright install`: the machine's own Chromium is driven
    python report.py run/report.html [--executable chromium] [--screenshot report.png [--dark] [--width 1280]]

What is expected is read from the JSON in the report, so any report will do. The first fault ends it, with exit code 1.
"""

import argparse
import functools
import html
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
import urllib.parse

from playwright.sync_api import Error, sync_playwright

DASH = "\N{EN DASH}"
BROWSERS = ["chromium", "chromium-browser", "google-chrome"]
# Above this many rows the table is looked at from both ends only.
WHOLE = 500


class Fault(Exception):
    pass


def expect(what, found, wanted):
    if found != wanted:
        raise Fault(f"{what}: found {shorten(found)}, wanted {shorten(wanted)}")


def hold(what, condition):
    if not condition:
        raise Fault(what)


def shorten(value):
    text = repr(value)
    return text if len(text) < 300 else text[:300] + " ..."


class Report:
    """A report open in a page of its own, which must stay silent and at home."""

    def __init__(self, browser, path, fragment="", missing_files=False, clipboard=True, **options):
        self.path, self.faults, self.missing_files = path, [], missing_files
        self.data = read(path)
        self.context = browser.new_context(**options)
        self.context.route("**/*", self.on_route)
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.page.on("console", self.on_console)
        self.page.on("pageerror", lambda error: self.faults.append(f"error in the page: {error}"))
        self.page.on("request", lambda request: self.on_url(request.url))
        self.page.on("websocket", lambda socket: self.on_url(socket.url))
        self.page.on("dialog", self.on_dialog)
        if not clipboard:
            self.page.add_init_script("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
        self.page.goto(path.as_uri() + fragment)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.context.close()
        if kind is None or issubclass(kind, Error):
            self.silent()

    def silent(self):
        if self.faults:
            raise Fault("; ".join(dict.fromkeys(self.faults)))

    def on_route(self, route):
        (route.continue_ if self.at_home(route.request.url) else route.abort)()

    def at_home(self, url):
        if url.startswith("file:"):
            target = pathlib.Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).resolve()
            return target == self.path or self.path.parent in target.parents
        return url.startswith("data:")

    def on_url(self, url):
        if not self.at_home(url):
            self.faults.append(f"a request leaves the report's folder: {url[:200]}")

    def on_console(self, message):
        absent = self.missing_files and "ERR_FILE_NOT_FOUND" in message.text
        if message.type in ("error", "warning") and not absent:
            self.faults.append(f"console {message.type}: {message.text} ({message.location.get('url', '')[:200]})")

    def on_dialog(self, dialog):
        self.faults.append(f"a script of the data ran: {dialog.message}")
        dialog.dismiss()

    # What a reader sees

    def text(self, selector):
        return self.page.locator(selector).first.text_content()

    def wait(self, what, script, argument=None):
        try:
            self.page.wait_for_function(script, arg=argument, timeout=15_000)
        except Error as error:
            self.silent()
            raise Fault(f"{what}: did not happen ({str(error).splitlines()[0]})") from error

    def end_of_table(self, last):
        """Indices of the rows in the table's first or last part, in order."""
        scroll = "last => { const box = document.getElementById('rows'); box.scrollTop = last ? box.scrollHeight : 0 }"
        self.page.evaluate(scroll, last)
        body = "[...document.querySelectorAll('#table tbody:not(.sizes)')].at(%d)" % (-1 if last else 0)
        self.wait("the table fills with rows", f"() => {body}.querySelector('button')")
        return self.page.evaluate(f"() => [...{body}.querySelectorAll('button')].map((button) => Number(button.dataset.row))")

    def order(self, wanted, what):
        """The table's rows are `wanted`: all of them, or both ends of a large table."""
        if 0 < len(wanted) <= WHOLE:
            part, found = "document.querySelectorAll('#table tbody:not(.sizes)')[part]", []
            for number in range(self.page.locator("#table tbody:not(.sizes)").count()):
                self.page.evaluate(f"part => {part}.scrollIntoView()", number)
                self.wait("the table fills with rows", f"part => {part}.querySelector('button')", number)
                indices = f"part => [...{part}.querySelectorAll('button')].map((b) => Number(b.dataset.row))"
                found += self.page.evaluate(indices, number)
            expect(what, found, wanted)
        elif wanted:
            top, bottom = self.end_of_table(False), self.end_of_table(True)
            expect(f"{what}, at the top", top, wanted[: len(top)])
            expect(f"{what}, at the bottom", bottom, wanted[-len(bottom) :])
        else:
            expect(what, self.page.locator("#table button[data-row]").count(), 0)

    def viewer_shows(self, index, what):
        row = self.data["rows"][index]
        self.wait(f"{what}: the viewer opens", "() => document.getElementById('viewer').open")
        expect(f"{what}: the command", self.text("#picture-command"), row["command"])
        self.wait(f"{what}: a picture", "() => document.querySelector('#pane img')?.naturalWidth > 0")
        self.wait(f"{what}: the address", "id => location.hash === '#' + encodeURIComponent(id)", row["id"])

    def closes(self, what):
        self.page.keyboard.press("Escape")
        self.wait(f"{what}: Escape closes", "() => !document.getElementById('viewer').open")
        self.wait(f"{what}: the address is the page's again", "() => location.hash === ''")


@functools.cache
def read(path):
    text = path.read_text(encoding="utf-8")
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    hold("the report has no data", found)
    hold("a < in the data is not written as \\u003c", "<" not in found[1])
    data = json.loads(found[1])
    data["head"] = html.unescape(re.search(r"<title>(.*?)</title>", text, re.DOTALL)[1])
    for name in ("title", "made", "command", "environment", "notes", "columns", "rows", "sheets", "plots", "summary"):
        hold(f"the data has no {name}", name in data)
    ids = [row["id"] for row in data["rows"]]
    expect("different ids", len(set(ids)), len(ids))
    for row in data["rows"]:
        expect(f"values of {row['id']}", len(row["values"]), len(data["columns"]))
    return data


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def sort(order, values, down):
    """As the table has to: stable, what is absent last in both directions."""
    absent = [i for i in order if values[i] is None]
    return sorted((i for i in order if values[i] is not None), key=lambda i: -values[i] if down else values[i]) + absent


def column(data, c):
    return [row["values"][c] for row in data["rows"]]


def numeric_columns(data):
    for c in range(len(data["columns"])):
        values = column(data, c)
        if len({v for v in values if v is not None}) > 1 and all(v is None or is_number(v) for v in values):
            yield c


def head_and_parts(report):
    data, page = report.data, report.page
    expect("the heading", report.text("#title"), data["title"])
    expect("the window's title", page.title().strip(), data["head"].strip())
    expect("the command of the sweep", report.text("#command"), data["command"])
    expect("plots", page.locator("#plot-list figure").count(), len(data["plots"]))
    for figure in page.locator("#plot-list svg").all():
        hold("a plot has no size", figure.bounding_box()["height"] > 20)
    expect("summary tables", page.locator("table.summary").count(), len(data["summary"]))
    expect("environment", page.locator("#environment-list dt").all_text_contents(), list(data["environment"]))
    expect("notes", page.locator("#notes li").all_text_contents(), data["notes"])
    heads = page.locator("#table thead th .name").all_text_contents()
    expect("columns", heads, [c["name"] for c in data["columns"]])
    nameless = """() => [...document.querySelectorAll('button, select, input')]
        .filter((control) => !(control.ariaLabel || control.textContent.trim() || control.labels?.length)).length"""
    expect("controls without a name", page.evaluate(nameless), 0)
    hold("too many rows are in the page at once", page.locator("#table tr").count() < 3 * WHOLE)


def stays_text(report):
    """Markup in prompts is shown, not obeyed. Scripts that ran, and requests, are found by the listeners."""
    data, page = report.data, report.page
    expect("scripts in the page", page.locator("script").count(), 2)
    expect("elements with handlers", page.locator("[onerror], [onload], [onclick]").count(), 0)
    hostile = [(i, v) for i, row in enumerate(data["rows"]) for v in row["values"] if isinstance(v, str) and "<" in v]
    for index, value in hostile[:1]:
        page.evaluate("id => { location.hash = encodeURIComponent(id) }", data["rows"][index]["id"])
        report.viewer_shows(index, "a row with markup")
        hold("markup in a value is not shown as text", value in page.locator("#values dd").all_text_contents())
        expect("elements with handlers", page.locator("[onerror], [onload], [onclick]").count(), 0)
        report.closes("a row with markup")


def sorts(report):
    data, page = report.data, report.page
    columns = list(numeric_columns(data))
    axes = [c for c in columns if data["columns"][c]["kind"] == "axis"]
    with_gaps = [c for c in columns if None in column(data, c)]
    order = list(range(len(data["rows"])))
    report.order(order, "the order at first")
    for c in dict.fromkeys(axes[:2] + with_gaps[:1]):
        name, values = data["columns"][c]["name"], column(data, c)
        head = page.locator("#table thead th").nth(c + 1)
        head.locator("button").click()
        expect(f"aria-sort of {name}", head.get_attribute("aria-sort"), "ascending")
        order = sort(order, values, down=False)
        report.order(order, f"rows by {name}")
        head.locator("button").press("Enter")
        expect(f"aria-sort of {name}", head.get_attribute("aria-sort"), "descending")
        order = sort(order, values, down=True)
        report.order(order, f"rows by {name}, downwards")
        if None in values:
            cell = page.locator(f'#table tr:has(button[data-row="{order[-1]}"]) td').nth(c + 1)
            expect(f"an absent {name}", cell.text_content(), DASH)
        if order:
            walk(report, order, f"rows by {name}")
        head.locator("button").click()
        order = list(range(len(data["rows"])))
        report.order(order, "the order after a third click")


def walk(report, order, what):
    """From the table's first picture on, through the table's order."""
    first = report.end_of_table(False)[0]
    report.page.locator(f'#table button[data-row="{first}"]').click()
    for index in order[:3]:
        report.viewer_shows(index, what)
        report.page.keyboard.press("ArrowRight")
    if len(order) > 3:
        report.viewer_shows(order[3], what)
        report.page.keyboard.press("ArrowLeft")
        report.viewer_shows(order[2], what)
    report.closes(what)


def filters(report):
    data, page = report.data, report.page
    rows, box = data["rows"], page.locator("#filter")

    def found(text, wanted):
        box.fill(text)
        count = int(report.text("#count").split(" of ")[0].replace(",", ""))
        expect(f"the count of rows that match {text!r}", count, len(wanted))
        report.order(wanted, f"rows that match {text!r}")

    if rows:
        wanted = rows[len(rows) // 2]["id"].lower()
        hold("an id contains a space", not re.search(r"\s", wanted))
        found(wanted, [i for i, row in enumerate(rows) if any(wanted in str(v).lower() for v in [row["id"], *row["values"]])])
    for c in list(numeric_columns(data))[:1]:
        name, values = data["columns"][c]["name"].lower().replace(" ", "_"), column(data, c)
        value = next(v for v in values if v is not None)
        found(f"{name}={value}", [i for i, v in enumerate(values) if v == value])
        found(f"{name}>{value}", [i for i, v in enumerate(values) if v is not None and v > value])
    found("no-such-text-anywhere", [])
    found("", list(range(len(rows))))
    for switch in page.locator("#kinds input").all():
        kind = switch.get_attribute("value")
        switch.uncheck()
        for head in page.locator(f"#table th.{kind}").all():
            hold(f"columns of the kind {kind} cannot be hidden", not head.is_visible())
        switch.check()


def sheets(report):
    data, page = report.data, report.page
    for number, sheet in enumerate(data["sheets"]):
        if len(data["sheets"]) > 1:
            page.locator("#sheet-choice").select_option(index=number)
        what = f"sheet {sheet['title']!r}"
        labels = page.locator("#sheet thead th .label").all_text_contents()
        expect(f"{what}: columns", labels, sheet["columns"]["values"])
        expect(f"{what}: rows", page.locator("#sheet tbody th .label").all_text_contents(), sheet["rows"]["values"])
        cells = [index for row in sheet["cells"] for index in row]
        shown = """() => [...document.querySelectorAll('#sheet td')]
            .map((cell) => cell.querySelector('button')?.dataset.row ?? null)"""
        expect(f"{what}: cells", [None if v is None else int(v) for v in page.evaluate(shown)], cells)
        # Copies, since those out of sight are not loaded yet.
        broken = """async () => {
            let count = 0;
            for (const { src } of [...document.querySelectorAll('#sheet img')].slice(0, 200))
                await Object.assign(new Image(), { src }).decode().catch(() => count++);
            return count;
        }"""
        expect(f"{what}: broken thumbnails", page.evaluate(broken), 0)
        filled = [place for place, index in enumerate(cells) if index is not None]
        if not filled:
            continue
        page.locator("#sheet button[data-row]").first.click()
        report.viewer_shows(cells[filled[0]], what)
        hold(f"{what}: a picture file is missing", not page.locator("#remark").is_visible())
        if number == 0:
            for place in filled[1:4]:
                page.keyboard.press("ArrowRight")
                report.viewer_shows(cells[place], f"{what}, arrow to the right")
            across, at = len(sheet["columns"]["values"]), filled[min(3, len(filled) - 1)]
            below = next((p for p in range(at + across, len(cells), across) if cells[p] is not None), at)
            page.keyboard.press("ArrowDown")
            report.viewer_shows(cells[below], f"{what}, arrow down")
        report.closes(what)


def zooms(report):
    page = report.page
    if not page.locator("#sheet img").count():
        return

    def width():
        return page.locator("#sheet img").first.bounding_box()["width"]

    slider = page.locator("#zoom")
    slider.press("Home")
    small = width()
    slider.press("End")
    large = width()
    hold(f"the zoom slider does not change the cells ({small} to {large} px)", large > 4 * small)
    page.locator("#sheet").hover()
    page.keyboard.down("Control")
    page.mouse.wheel(0, 300)
    page.keyboard.up("Control")
    smaller = "large => document.querySelector('#sheet img').getBoundingClientRect().width < large - 1"
    report.wait("Ctrl and the wheel make cells smaller", smaller, large)
    row = report.data["rows"][int(page.locator("#sheet img").first.get_attribute("data-row"))]
    box = page.locator("#sheet img").first.bounding_box()
    hold("a cell does not keep its picture's proportions", abs(box["width"] / box["height"] - row["width"] / row["height"]) < 0.05)


def opens_by_address(browser, path, data):
    index = len(data["rows"]) - 1
    fragment = "#" + urllib.parse.quote(data["rows"][index]["id"], safe="!'()*")
    with Report(browser, path, fragment) as report:
        report.viewer_shows(index, "the address of a picture")
        report.closes("the address of a picture")
        report.page.evaluate("hash => { location.hash = hash }", fragment)
        report.viewer_shows(index, "another address while the page is open")
        report.page.go_back()
        report.wait("Back closes the picture", "() => !document.getElementById('viewer').open")


def copies_without_clipboard(browser, path, data):
    with Report(browser, path, clipboard=False) as report:
        report.page.locator("#copy-command").click()
        selected = "wanted => getSelection().toString().trim() === wanted.trim()"
        report.wait("the command is selected", selected, data["command"])


def fits(browser, path, data):
    for width in (390, 1280):
        with Report(browser, path, viewport={"width": width, "height": 844}) as report:
            for state in ("closed", "open"):
                wide = report.page.evaluate("document.documentElement.scrollWidth")
                hold(f"the page is {wide} px wide in a window of {width} px (viewer {state})", wide <= width)
                report.page.evaluate("id => { location.hash = encodeURIComponent(id) }", data["rows"][0]["id"])
                report.viewer_shows(0, f"a window of {width} px")
                wide = report.page.evaluate("document.getElementById('viewer').scrollWidth")
                hold(f"the viewer is {wide} px wide in a window of {width} px", wide <= width)


def survives_missing_files(browser, path, data):
    """The HTML alone, moved away from its pictures, shows thumbnails and says so."""
    files = [i for i, row in enumerate(data["rows"]) if row["thumb"] and not (row["picture"] or "data:").startswith("data:")]
    index = next(iter(files), None)
    if index is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        lone = pathlib.Path(shutil.copy(path, pathlib.Path(folder).resolve() / "lone.html"))
        with Report(browser, lone, "#" + data["rows"][index]["id"], missing_files=True) as report:
            report.viewer_shows(index, "a missing picture file")
            remark = report.page.locator("#remark")
            hold("a missing picture file is not remarked upon", remark.is_visible() and data["rows"][index]["picture"] in remark.text_content())


def prints(report):
    if len(report.data["rows"]) > WHOLE:
        return
    report.page.pdf()
    first = report.page.locator("#sheet table").count()
    expect("sheets after printing", first, min(1, len(report.data["sheets"])))


def check(browser, path):
    data = read(path)
    with Report(browser, path) as report:
        for part in (head_and_parts, stays_text, sorts, filters, sheets, zooms, prints):
            part(report)
            report.silent()
    if data["rows"]:
        for part in (opens_by_address, fits, survives_missing_files):
            part(browser, path, data)
    copies_without_clipboard(browser, path, data)
    return f"{len(data['rows'])} pictures, {len(data['sheets'])} sheets, {len(data['plots'])} plots: sound"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=pathlib.Path)
    parser.add_argument("--executable", help=f"the browser; default: the first of {', '.join(BROWSERS)} in PATH")
    parser.add_argument("--screenshot", type=pathlib.Path, help="PNG of the whole page, made once everything holds")
    parser.add_argument("--dark", action="store_true", help="screenshot in dark colours")
    parser.add_argument("--width", type=int, default=1280, help="of the screenshot, in pixels")
    options = parser.parse_args()
    executable = options.executable or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not executable:
        sys.exit(f"no browser: none of {', '.join(BROWSERS)} is in PATH, and no --executable is given")
    path = options.report.resolve()
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=executable, args=arguments)
        try:
            print(check(browser, path))
            if options.screenshot:
                scheme = "dark" if options.dark else "light"
                with Report(browser, path, viewport={"width": options.width, "height": 900}, color_scheme=scheme) as report:
                    report.page.wait_for_timeout(1000)
                    report.page.screenshot(path=options.screenshot, full_page=True)
        except (Fault, Error) as fault:
            sys.exit(f"{path.name}: {fault}")
        finally:
            browser.close()


if __name__ == "__main__":
    main()
