"""The page-reading tool: what it reads and refuses, its limits, recording and replaying."""

import gzip
import inspect
import ipaddress
import multiprocessing
import pickle
import ssl
import threading
import time
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import trustme
from transformers.utils import get_json_schema

from igpo_trl.rollout import ToolCall, ToolRunner
from igpo_trl.search import CacheMiss, PageError, PageReader, ReadPageTool
from igpo_trl.search.network import fetching
from igpo_trl.search.network.fetching import check_page_url, is_public
from igpo_trl.search.network.pages import cut_words
from igpo_trl.search.network.response_cache import FILE

ARTICLE = """<!doctype html><html><head><title>Dune  (novel)</title><script>var menu = 1;</script></head><body>
<nav><a href="/">Home</a> <a href="/buy">Buy now</a></nav><main><h1>Dune</h1>
<p>Dune is a 1965 epic science fiction novel by American author Frank Herbert, published in a magazine before.</p>
<p>It tied with another novel for the Hugo Award in 1966, and won the first Nebula Award for the best novel. Käse.</p>
</main><footer>Cookies and imprint</footer></body></html>"""


class Site:
    """A web server on an address of this machine; `pages` maps a path to what a handler does."""

    def __init__(self, pages, address="127.0.0.1", tls=None) -> None:
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.names: list[str] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                site.seen.append((self.path, dict(self.headers.items())))
                page = pages[self.path.split("?")[0]]
                if callable(page):
                    page(self)
                    return
                status, kind, body, *more = page
                data = body if isinstance(body, bytes) else body.encode()
                self.send_response(status)
                headers = {"Content-Type": kind, "Content-Length": str(len(data)), **(more[0] if more else {})}
                for name, value in headers.items():
                    if value is not None:
                        self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer((address, 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *args: None  # a client that does not read on
        self.port = self.server.server_port
        self.url = f"http://{address}:{self.port}"
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.configure_cert(context)
            context.sni_callback = lambda connection, name, _: self.names.append(name)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def html(body, **headers):
    return 200, "text/html; charset=utf-8", body, headers


def redirect(location, status=302):
    return status, "text/html", "", {"Location": location}


def drip(handler):
    """A byte now and then, without end."""
    handler.send_response(200)
    handler.send_header("Content-Type", "text/plain")
    handler.end_headers()
    while True:
        handler.wfile.write(b"x")
        handler.wfile.flush()
        time.sleep(0.02)


def drip_headers(handler):
    while True:
        handler.wfile.write(b"H")
        time.sleep(0.02)


def endless(handler):
    handler.send_response(200)
    handler.send_header("Content-Type", "text/plain")
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(b"word " * 2000)


PAGES = {
    "/dune": html(ARTICLE),
    "/latin": (200, "text/html; charset=latin-1", ARTICLE.encode("latin-1")),
    "/nocharset": (200, "text/html", ARTICLE.replace("<head>", "<head><meta charset=latin-1>").encode("latin-1")),
    "/odd-charset": (200, "text/plain; charset=klingon", "nuqneH"),
    "/plain": (200, "text/plain", "First line.\n\n  Second   line. \x00\n"),
    "/zipped": (200, "text/html", gzip.compress(ARTICLE.encode()), {"Content-Encoding": "gzip"}),
    "/bomb": (200, "text/plain", gzip.compress(b"a " * 30_000_000), {"Content-Encoding": "gzip"}),
    "/brotli": (200, "text/html", b"xx", {"Content-Encoding": "br"}),
    "/not-gzip": (200, "text/html", b"xx", {"Content-Encoding": "gzip"}),
    "/pdf": (200, "application/pdf", b"%PDF-1.7"),
    "/no-type": (200, "x", "text", {"Content-Type": None}),
    "/json": (200, "application/json", "{}"),
    "/empty": html(""),
    "/garbage": (200, "text/html", bytes(range(256)) * 20),
    "/missing": (404, "text/html", "no"),
    "/busy": (503, "text/html", "no"),
    "/long": (200, "text/plain", "word " * 5000),
    "/once": redirect("/dune?from=once#part"),
    "/permanent": redirect("/once", 308),
    "/loop": redirect("/loop"),
    "/nowhere": redirect("http://[::1/"),
    "/file": redirect("file:///etc/passwd"),
    "/drip": drip,
    "/drip-headers": drip_headers,
    "/endless": endless,
}


@pytest.fixture(scope="module")
def site():
    with Site(PAGES) as running:
        yield running


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    # A reader that used proxies of the environment could not connect.
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


def reader(cache=None, allow=("127.0.0.1/32",), **options):
    return PageReader(cache, allow=allow, **{"timeout": 5.0, "max_attempts": 1, **options})


# Reading


@pytest.mark.parametrize("path", ["/dune", "/latin", "/nocharset", "/zipped", "/once", "/permanent"])
def test_a_page_is_its_title_and_text_without_what_is_around_it(site, path):
    page = reader().read(site.url + path)
    assert page.title == "Dune (novel)"
    assert "Dune is a 1965 epic science fiction novel" in page.text and page.text.endswith("Käse.")
    assert not any(word in page.text for word in ("menu", "Buy", "Cookies", "<p>"))
    expected = "/dune?from=once" if path in ("/once", "/permanent") else path
    assert page.id.startswith(site.url + expected)


def test_plain_text_is_taken_as_it_is(site):
    page = reader().read(f" {site.url}/plain\n")
    assert (page.title, page.text) == ("", "First line.\n\n  Second   line.")
    assert reader().read(site.url + "/odd-charset").text == "nuqneH"


def test_the_request_has_the_expected_headers_and_no_others(site):
    site.seen.clear()
    reader(user_agent="test agent").read(f"{site.url}/plain?a=1&b=%20ä#part")
    ((path, headers),) = site.seen
    assert path == "/plain?a=1&b=%20%C3%A4"
    assert headers == {
        "Host": f"127.0.0.1:{site.port}",
        "Accept-Encoding": "gzip",
        "User-Agent": "test agent",
        "Accept": "text/html, application/xhtml+xml, text/plain",
    }


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/pdf", "the page is of type 'application/pdf'; only text/html and .*text/plain can be read"),
        ("/json", "type 'application/json'"),
        ("/no-type", "type 'unknown'"),
        ("/brotli", "compressed in a way that cannot be read .'br'"),
        ("/not-gzip", "damaged"),
        ("/empty", "the page has no text"),
        ("/missing", "the server answered with status 404"),
        ("/loop", "redirects more than 5 times"),
        ("/nowhere", "redirects to something that is not a valid URL"),
        ("/file", "only URLs that begin with http:// or https://"),
    ],
)
def test_unreadable_pages_are_explained(site, path, message):
    with pytest.raises(PageError, match=message):
        reader().read(site.url + path)


def test_garbage_is_an_error_or_text_and_nothing_else(site):
    try:
        assert isinstance(reader().read(site.url + "/garbage").text, str)
    except PageError:
        pass


def test_a_busy_server_gets_another_request_and_a_missing_page_does_not(site):
    for path, times in (("/busy", 2), ("/missing", 1)):
        site.seen.clear()
        with pytest.raises(PageError):
            reader(max_attempts=2).read(site.url + path)
        assert len(site.seen) == times


def test_size_and_time_are_bounded(site):
    start = time.monotonic()
    assert len(reader(max_bytes=10_000).read(site.url + "/endless").text) in range(9_990, 10_001)
    for path in ("/drip", "/drip-headers"):
        with pytest.raises(PageError, match="took longer than 0.3 s"):
            reader(timeout=0.3).read(site.url + path)
    with pytest.raises(PageError, match="redirects more than 0 times"):
        reader(max_redirects=0).read(site.url + "/once")
    assert time.monotonic() - start < 5


def test_decompression_is_limited(site):
    assert len(PAGES["/bomb"][2]) < 100_000
    reads = reader(max_bytes=100_000)
    tracemalloc.start()
    try:
        assert len(reads.read(site.url + "/bomb").text) in range(99_990, 100_001)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000  # of 60,000,000
    finally:
        tracemalloc.stop()


def test_words_shown_are_bounded_and_lines_are_kept():
    assert cut_words("a b\n\nc d", 3) == "a b\n\nc …"
    assert cut_words("a b\n\nc d", 4) == "a b\n\nc d"
    assert cut_words("", 1) == ""
    assert len(cut_words("漢" * 1000, 10)) == 122  # a script without spaces


# Refusing


FORBIDDEN = [
    *("127.0.0.1", "127.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "0.0.0.0", "0.1.2.3"),
    *("169.254.169.254", "100.64.0.1", "100.100.100.200", "192.0.0.192", "192.0.2.1", "198.18.0.1", "198.51.100.1"),
    *("203.0.113.5", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "192.88.99.1", "168.63.129.16"),
    *("::", "::1", "fe80::1", "fc00::1", "fd00:ec2::254", "ff02::1", "fec0::1", "2001:db8::1", "100::1", "5f00::1"),
    *("::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::"),
    *("2001:0:7f00:1::", "3fff::1", "4000::1", "::ffff:0:127.0.0.1"),
]
PUBLIC = ["8.8.8.8", "93.184.216.34", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "2a00:1450:4001:80b::200e"]


@pytest.mark.parametrize("address", FORBIDDEN)
def test_an_address_that_is_not_public(address):
    assert not is_public(ipaddress.ip_address(address))
    host = f"[{address}]" if ":" in address else address
    with pytest.raises(PageError, match="not a public address"):
        check_page_url(f"http://{host}:8080/x")


@pytest.mark.parametrize("address", PUBLIC)
def test_an_address_that_is_public(address):
    assert is_public(ipaddress.ip_address(address))
    host = f"[{address}]" if ":" in address else address
    assert check_page_url(f"https://{host}/x").host == address


@pytest.mark.parametrize(
    ("url", "message"),
    [
        *((f"http://{host}/", "a host name") for host in ("2130706433", "0x7f000001", "017700000001", "127.1")),
        *((f"http://{host}/", "a host name") for host in ("0x7f.0.0.1", "127.0.0.1.", "localhost.", "127.0.0.0x1")),
        *((f"http://{host}/", "a host name") for host in ("a..b", "-a.com", "134744072", "1.2.3.4.5", "a%00b")),
        *((f"http://{host}/", "valid|host name") for host in ("0177.0.0.1", "①②⑦.⓪.⓪.①", "[::1%25eth0]", "ⓛocalhost")),
        *((f"http://{host}/", "valid|host name") for host in ("", "[::1", "[127.0.0.1]", "a:b", "[::1]x")),
        *((f"http://127{dot}0{dot}0{dot}1/", "not a public address") for dot in "。．｡."),
        *((f"http://{user}@example.org/", "user name or pass") for user in ("user", "user:pw", "", ":", "a%40b")),
        ("http://example.org:70000/", "there is no port 70000"),
        ("http://example.org@127.0.0.1/", "user name or password"),
        ("http://127.0.0.1#@example.org/", "not a public address"),
        ("http://a b.com/", "characters"),
        ("http://example.org\\@127.0.0.1/", "characters"),
        ("http://127.0.0.1\t/", "characters"),
        ("http://example.org/\r\nX: 1", "characters"),
        ("http://example.org/" + "a" * 3000, "longer than 2048"),
        *((f"{scheme}://example.org/", "only URLs that begin") for scheme in ("ftp", "file", "gopher", "javascript")),
        *((text, "only URLs|valid URL") for text in ("", "example.org", "/etc/passwd", "data:text/html,hi", "//a.b/")),
    ],
)  # fmt: skip
def test_an_address_in_an_odd_form(url, message):
    with pytest.raises(PageError, match=message):
        PageReader(look_up=lambda host, port: pytest.fail(f"looked up {host}")).read(url)


def test_the_system_resolver_is_checked_as_well():
    for host in ("localhost", "ip6-localhost"):
        with pytest.raises(PageError, match=f"{host} is not a public address|{host} is not known"):
            PageReader(max_attempts=1).read(f"http://{host}:9/")
    with pytest.raises(PageError, match="localhost is not a public address"):
        PageReader().read("http://LOCALHOST:9/")
    with pytest.raises(PageError, match="no-such-host.invalid is not known"):
        PageReader(max_attempts=1).read("http://no-such-host.invalid/")
    with pytest.raises(PageError, match="is not known"):
        PageReader(max_attempts=1).read(f"http://{'a' * 70}.org/")


def test_a_redirect_is_checked_again(site):
    with Site({"/secret": html(ARTICLE)}, "127.0.0.2") as inside:
        targets = [
            f"{inside.url}/secret",
            f"//127.0.0.2:{inside.port}/secret",
            f"http://2130706434:{inside.port}/secret",
        ]
        targets += [f"http://inside.test:{inside.port}/secret", f"http://[::ffff:127.0.0.2]:{inside.port}/secret"]
        names = {"inside.test": ["127.0.0.2"], "127.0.0.1": ["127.0.0.1"]}
        for target in targets:
            PAGES["/away"] = redirect(target)
            with pytest.raises(PageError, match="not a public address|not a host name"):
                reader(look_up=lambda host, port: names[host]).read(site.url + "/away")
        assert inside.seen == []
        assert reader(allow=["127.0.0.0/8"]).read(site.url + "/away".replace("away", "once")).title  # the way is open


def test_a_name_is_looked_up_once_and_the_connection_goes_to_what_was_checked(site):
    """Rebinding: a resolver that gives a harmless address first, and another one the next time."""
    with Site({"/x": html(ARTICLE)}, "127.0.0.2") as inside:
        answers = iter([["127.0.0.1"], ["127.0.0.2"], ["127.0.0.2"]])
        lookups = []

        def look_up(host, port):
            lookups.append((host, port))
            return next(answers)

        site.seen.clear()
        page = reader(look_up=look_up).read(f"http://rebinding.test:{site.port}/dune")
        assert page.title and lookups == [("rebinding.test", site.port)]
        assert site.seen[0][1]["Host"] == f"rebinding.test:{site.port}"
        with pytest.raises(PageError, match="rebinding.test is not a public address"):
            reader(look_up=look_up).read(f"http://rebinding.test:{inside.port}/x")
        assert inside.seen == []


@pytest.mark.parametrize(
    "addresses", [["127.0.0.1", "10.0.0.1"], ["10.0.0.1", "127.0.0.1"], ["127.0.0.1", "::1"], [], ["fe80::1%eth0"]]
)
def test_one_address_that_is_not_public_among_others_is_enough(site, addresses):
    site.seen.clear()
    with pytest.raises(PageError, match="not a public address"):
        reader(look_up=lambda host, port: addresses).read(f"http://mixed.test:{site.port}/dune")
    assert site.seen == []


def test_another_address_is_tried_if_one_does_not_answer(site):
    page = reader(allow=["127.0.0.0/8"], look_up=lambda host, port: ["127.0.0.3", "127.0.0.1"]).read(
        f"http://two.test:{site.port}/dune"
    )
    assert page.title
    with pytest.raises(PageError, match="the connection failed"):
        reader(allow=["127.0.0.0/8"], look_up=lambda host, port: ["127.0.0.3"]).read(f"http://a.test:{site.port}/")


def test_tls_is_verified_for_the_name_and_not_for_the_address():
    authority = trustme.CA()
    trusted = ssl.create_default_context()
    authority.configure_trust(trusted)
    options = {"look_up": lambda host, port: ["127.0.0.1"], "ssl_context": trusted}
    with Site(PAGES, tls=authority.issue_cert("pinned.test")) as site:
        assert reader(**options).read(f"https://pinned.test:{site.port}/dune").title == "Dune (novel)"
        assert site.names == ["pinned.test"]
        with pytest.raises(PageError, match="(?i)connection failed .*hostname mismatch"):
            reader(**options).read(f"https://other.test:{site.port}/dune")
        with pytest.raises(PageError, match="(?i)connection failed .*certificate"):
            reader(look_up=options["look_up"]).read(f"https://pinned.test:{site.port}/dune")
        with pytest.raises(PageError, match="connection failed|took longer"):
            reader(timeout=1.0).read(f"http://127.0.0.1:{site.port}/dune")


# Recording


def test_modes(site, tmp_path):
    first = reader(tmp_path).read(site.url + "/dune")
    site.seen.clear()
    assert reader(tmp_path).read(site.url + "/dune#elsewhere") == first
    assert site.seen == []
    assert reader(tmp_path, mode="record").read(site.url + "/dune") == first
    with pytest.raises(PageError, match="404"):
        reader(tmp_path, mode="record").read(site.url + "/missing")
    assert len(site.seen) == 2
    replay = reader(tmp_path, mode="replay")
    assert replay.read(site.url + "/dune") == first
    with pytest.raises(PageError, match="404"):
        replay.read(site.url + "/missing")
    with pytest.raises(CacheMiss, match=f"not recorded in .*{FILE}: {site.url}/plain"):
        replay.read(site.url + "/plain")
    with pytest.raises(PageError, match="not available"):
        reader(tmp_path, mode="replay", missing="empty").read(site.url + "/plain")
    assert len(site.seen) == 2
    with pytest.raises(PageError, match="404"):  # live tries again what failed
        reader(tmp_path).read(site.url + "/missing")
    assert len(site.seen) == 3
    with pytest.raises(
        PageError, match="not a public address"
    ):  # what may not be read is not read from the cache either
        PageReader(tmp_path, mode="replay").read(site.url + "/dune")


def _read(url, directory, queue):
    reads = reader(directory, mode="record")
    queue.put([reads.read(f"{url}/long?{i}").text for i in range(10)])


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_two_processes_record_into_one_cache(site, tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_read, args=(site.url, tmp_path, queue)) for _ in range(2)]
    for child in children:
        child.start()
    recorded = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    replay = reader(tmp_path, mode="replay")
    assert recorded[0] == recorded[1] == [replay.read(f"{site.url}/long?{i}").text for i in range(10)]


# The tool


def test_the_tool_shows_the_page_or_what_is_wrong(site):
    tool = ReadPageTool(reader(), max_words=8)
    assert tool(url=site.url + "/dune").startswith("Dune (novel)\nDune")
    assert tool(url=site.url + "/plain") == "First line.\n\n  Second   line."
    assert tool(url=site.url + "/long") == "word " * 8 + "…"
    assert tool(url="http://169.254.169.254/latest/meta-data/") == "Error: 169.254.169.254 is not a public address."
    assert tool(url=site.url + "/pdf").startswith("Error: the page is of type 'application/pdf'")
    assert tool(url=["http://a"]) == "Error: the URL must be a string, got list."
    for url in (
        "",
        "http://",
        "\ud83d",
        "http://\ud83d/",
        "http://[",
        "x" * 5000,
        "http://a\x00b/",
        "https://exa mple.org",
    ):
        assert tool(url=url).startswith("Error: ")
    assert len(ReadPageTool(reader(), max_words=None)(url=site.url + "/long").split()) == 5000


def test_the_tool_is_one_for_chat_templates_and_runners(site):
    tool = ReadPageTool(reader())
    schema = get_json_schema(tool)["function"]
    assert (schema["name"], schema["description"]) == ("read_page", "Read a page of the web.")
    assert (
        schema["parameters"]["properties"]["url"]["description"] == "The address of the page, as in a search result."
    )
    assert list(inspect.signature(tool).parameters) == ["url"]
    assert tool.tool_options.pure and tool.tool_options.timeout > 5
    site.seen.clear()
    runner = ToolRunner()
    urls = [site.url + "/dune", site.url + "/plain", site.url + "/dune", "http://10.0.0.1/"]
    results = runner.run([ToolCall("read_page", {"url": url}, tool) for url in urls])
    assert all(result.error is None for result in results)
    assert results[0].text == results[2].text and "1965" in results[0].text
    assert results[3].text == "Error: 10.0.0.1 is not a public address."
    assert len(site.seen) == 2  # equal calls of a round are one
    runner.close()


def test_a_reader_goes_to_another_process(site, tmp_path):
    reads = reader(tmp_path)
    assert pickle.loads(pickle.dumps(reads)).read(site.url + "/dune") == reads.read(site.url + "/dune")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 0}, "timeout=0"),
        ({"max_bytes": 0}, "max_bytes=0"),
        ({"max_attempts": 0}, "max_attempts=0"),
        ({"max_redirects": -1}, "max_redirects=-1"),
        ({"allow": "10.0.0.0/8"}, "expected a list of networks"),
        ({"allow": ["10.0.0.1/8"]}, "host bits"),
        ({"user_agent": "a\nb"}, "printable ASCII"),
        ({"mode": "replay"}, "needs a directory"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        PageReader(**options)
    with pytest.raises(ValueError, match="max_words=0"):
        ReadPageTool(max_words=0)
    with pytest.raises(
        TypeError, match=r"got reader='answers/', expected a PageReader, such as PageReader\('answers/'\)"
    ):
        ReadPageTool("answers/")


def test_without_the_check_a_private_address_can_be_read(site, monkeypatch):
    """Without the check, the same address can be read, so the tests above do test the check."""
    url = f"http://localhost:{site.port}/dune"
    with pytest.raises(PageError, match="not a public address"):
        PageReader().read(url)
    monkeypatch.setattr(fetching, "is_public", lambda address, allowed=(): True)
    assert PageReader().read(url).title == "Dune (novel)"
