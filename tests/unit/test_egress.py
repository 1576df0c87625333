"""The way to the outside: settings that cannot be used are named, and what they mean to programs."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from ansible_collections.glm.fleet.plugins.filter import egress
from ansible_collections.glm.fleet.plugins.module_utils import authority

PEM = "-----BEGIN CERTIFICATE-----\nMII\n-----END CERTIFICATE-----\n"


@pytest.mark.parametrize(
    ("proxy", "said"),
    [
        ("http://proxy.example.com:3128", ""),
        ("http://[2001:db8::1]:3128/", ""),
        ("proxy.example.com:3128", "glm_http_proxy: proxy.example.com:3128 is no proxy: write http://HOST:PORT"),
        ("http://proxy", "glm_http_proxy: http://proxy is no proxy: write http://HOST:PORT"),
        ("http://proxy:port", "glm_http_proxy: http://proxy:port is no proxy: write http://HOST:PORT"),
        ("socks5://proxy:1080", "glm_http_proxy: socks5://proxy:1080 is no proxy: write http://HOST:PORT"),
    ],
)
def test_a_proxy_is_an_address_with_a_port(proxy: str, said: str) -> None:
    assert egress.egress_problems(proxy, [], "") == ([said] if said else [])


def test_a_password_of_a_proxy_is_refused_and_not_repeated() -> None:
    (said,) = egress.egress_problems("http://user:geheim@proxy:3128", [], "")
    assert "would be readable in the files of apt and Docker" in said
    assert "geheim" not in said


def test_hosts_that_are_reached_directly_have_names_or_addresses() -> None:
    assert egress.egress_problems("", ["mirror.example.com", ".example.com", "10.0.0.1", "2001:db8::1"], "") == []
    wrong = ["http://mirror", "10.0.0.0/8", "*.example.com"]
    said = egress.egress_problems("", wrong, "")
    assert [line.split()[1] for line in said] == wrong


def test_a_file_of_certificates_holds_certificates_alone(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    missing = f"glm_ca_file: {file} cannot be read on the controller (No such file or directory)"
    assert egress.egress_problems("", [], str(file)) == [missing]
    file.write_text("hello")
    assert "holds no certificate in PEM" in egress.egress_problems("", [], str(file))[0]
    file.write_text(f"{PEM}-----BEGIN PRIVATE KEY-----\n")
    assert "holds a private key" in egress.egress_problems("", [], str(file))[0]
    file.write_text(PEM)
    assert egress.egress_problems("", [], str(file)) == []


def test_what_a_node_asks_of_itself_never_goes_by_the_proxy() -> None:
    environment = egress.egress_environment("http://proxy:3128", ["mirror"])
    assert environment["no_proxy"] == environment["NO_PROXY"] == "localhost,127.0.0.1,::1,mirror"
    assert environment["https_proxy"] == environment["HTTP_PROXY"] == "http://proxy:3128"
    assert egress.docker_proxies("http://proxy:3128", ["mirror"]) == {
        "http-proxy": "http://proxy:3128",
        "https-proxy": "http://proxy:3128",
        "no-proxy": "localhost,127.0.0.1,::1,mirror",
    }
    assert egress.egress_environment("", ["mirror"]) == egress.docker_proxies("", ["mirror"]) == {}


def test_a_private_authority_is_trusted_beside_the_system_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = tmp_path / "system.crt"
    system.write_text("of the system\n")
    monkeypatch.setattr(authority, "SYSTEM", system)
    with authority.ca_path(PEM) as path:
        assert path and Path(path).read_text() == f"of the system\n\n{PEM}"
    assert not Path(path).exists()
    with authority.ca_path("") as path:
        assert path is None
    assert authority.context("").verify_mode == ssl.CERT_REQUIRED
    with pytest.raises(ssl.SSLError):
        authority.context(PEM)
