"""tools/uv: uv takes the settings of pip."""

from __future__ import annotations

from loading import ROOT, load_file

uv = load_file(ROOT / "tools/uv", "tools_uv")

LISTING = """\
:env:.find-links='/wheels'
global.cert='/etc/ca.crt'
global.extra-index-url='file:///a\\nfile:///b'
global.find-links='/other'
global.constraint='/etc/constraints.txt'
install.index-url='https://mirror.example/simple'
global.index-url='https://other.example/simple'
download.index-url='https://third.example/simple'
"""


def test_each_setting_by_its_own_name() -> None:
    assert uv.settings(LISTING) == {
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_DEFAULT_INDEX": "https://mirror.example/simple",
        "UV_INDEX": "file:///a file:///b",
        "UV_FIND_LINKS": "/wheels",
        "SSL_CERT_FILE": "/etc/ca.crt",
    }


def test_a_pip_without_settings() -> None:
    assert uv.settings("") == {"UV_INDEX_STRATEGY": "unsafe-best-match"}
