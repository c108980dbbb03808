"""Who may use the server: the API key, the names in the Host header, and paths that can be closed."""

import hmac

import pytest
from fastapi.testclient import TestClient

from sq_llava.early_checks import require_key
from sq_llava.serving.app import create_app
from sq_llava.serving.connections import hosts_to_accept
from sq_llava.serving.settings import Access, Limits


def http_of(assistant, host: str = "testserver", api_key: str | None = None, **access) -> TestClient:
    app = create_app(assistant, "tiny", Limits(), 1, api_key, Access(**access))
    return TestClient(app, base_url=f"http://{host}")


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer s3cret", 200),
        ("bearer s3cret", 200),
        ("BEARER  s3cret", 200),
        ("Basic s3cret", 401),
        ("s3cret", 401),
        ("Bearer s3cre", 401),
        ("Bearer s3cret2", 401),
        ("Bearer sécret".encode("latin-1"), 401),
        ("", 401),
    ],
)
def test_key_is_needed_for_every_path_but_health(header, status, assistant):
    http = http_of(assistant, api_key="s3cret")
    for path in ("/v1/models", "/metrics", "/openapi.json"):
        assert http.get(path, headers={"Authorization": header}).status_code == status, path
    for path in ("/v1/models", "/metrics", "/openapi.json", "/v2", "/Health", "/health/"):
        assert http.get(path, follow_redirects=False).status_code == 401, path
    assert http.get("/health").status_code != 401


@pytest.mark.parametrize("ending", ["\n", "\r\n", " "])
def test_white_space_after_the_key_does_not_lock_everybody_out(ending, assistant, monkeypatch):
    monkeypatch.setenv("SECRET", f"s3cret{ending}")
    for api_key in (require_key("SECRET"), f"s3cret{ending}"):
        http = http_of(assistant, api_key=api_key)
        assert http.get("/v1/models", headers={"Authorization": "Bearer s3cret"}).status_code == 200
    monkeypatch.setenv("SECRET", ending)
    with pytest.raises(ValueError, match="SECRET is not set, or is empty"):
        require_key("SECRET")
    with pytest.raises(ValueError, match="api_key is empty"):
        http_of(assistant, api_key=ending)


def test_keys_are_compared_in_constant_time_and_by_digests_of_one_length(assistant, monkeypatch):
    compared, compare = [], hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or compare(a, b))
    http = http_of(assistant, api_key="s3cret")
    for header in ("Bearer s", "Basic " + "s" * 500, ""):
        assert http.get("/v1/models", headers={"Authorization": header}).status_code == 401
    assert compared == [(32, 32)] * 3


def test_metrics_and_schema_can_be_closed(assistant):
    for setting, path in {"disable_metrics": "/metrics", "disable_fastapi_docs": "/openapi.json"}.items():
        assert http_of(assistant).get(path).status_code == 200
        assert http_of(assistant, **{setting: True}).get(path).status_code == 404


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("[::1]:8000", 200),
        ("example.org:8000", 200),
        ("evil.example", 400),
        ("localhost.evil.example", 400),
        ("127.0.0.1.evil.example", 400),
        ("example.org@evil.example", 400),
    ],
)
def test_web_page_whose_name_points_to_this_machine_is_refused(name, status, assistant):
    """DNS rebinding: the browser of a visitor sends the name of the page."""
    http = http_of(assistant, allowed_hosts=hosts_to_accept("127.0.0.1", ["example.org"]))
    for path in ("/v1/models", "/metrics"):
        assert http.get(path, headers={"Host": name}).status_code == status
