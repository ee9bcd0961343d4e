"""Logging in by the hospital's provider: a real one on loopback, its good tokens and every kind of bad one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from busgen_cds import settings
from busgen_cds.errors import Misconfigured, Transient, Untrusted
from busgen_cds.operations import pages
from busgen_cds.store.people import ROLES
from busgen_cds.web import oidc
from busgen_cds.web.oidc import FLOW_SECONDS, NotVouched, Provider, Registration
from tests.web.practice import PASSWORD, Practice, served
from tests.web.provider import CLIENT, SECRET, OpenIdProvider, running
from tests.web.test_in_browser import Person

ROLES_HERE = {"breast-radiology": ("reader",), "pacs-team": ("operator",)}


@pytest.fixture
def provider() -> Iterator[OpenIdProvider]:
    with running() as made:
        yield made


@pytest.fixture(scope="module")
def practice(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Practice]:
    made = Practice(Path(tmp_path_factory.mktemp("oidc")))
    made.person("ada", "admin")
    yield made
    made.close()


def registered(
    provider: OpenIdProvider, redirect: str = "http://127.0.0.1:1/login/back", **changed: Any
) -> Registration:
    made = Registration(provider.issuer, CLIENT, redirect, SECRET, roles=ROLES_HERE)
    return replace(made, **changed)


class Flow:
    """One browser that goes to the provider and comes back."""

    def __init__(self, practice: Practice, provider: OpenIdProvider, **changed: Any) -> None:
        self.now = time.time()
        self.ours = Provider(registered(provider, **changed), practice.vault, lambda: self.now)
        self.begun = self.ours.begin("/worklist")
        back = httpx.get(self.begun.address, timeout=30).headers["location"]
        self.answer = {name: values[0] for name, values in parse_qs(urlsplit(back).query).items()}

    def finish(self) -> Any:
        return self.ours.finish(self.begun.cookie, self.answer)


def test_a_person_of_the_provider(practice: Practice, provider: OpenIdProvider) -> None:
    """Who the provider vouches for is known by subject, with the roles that the site's table gives the claim."""
    who, to = Flow(practice, provider).finish()
    assert (who.issuer, who.subject, who.name, who.roles) == (provider.issuer, "u-17", "Ruth", ("reader",))
    assert to == "/worklist"
    assert provider.redeemed == 1


def test_roles_by_claim(practice: Practice, provider: OpenIdProvider) -> None:
    """Roles are found in a list, a text or inside objects; a group that the table does not name gives nothing."""
    provider.person = {"sub": "u", "groups": ["pacs-team", "breast-radiology", "canteen"]}
    assert Flow(practice, provider).finish()[0].roles == ("reader", "operator")
    provider.person = {"sub": "u", "realm_access": {"roles": ["pacs-team"]}}
    assert Flow(practice, provider, role_claim="realm_access.roles").finish()[0].roles == ("operator",)
    provider.person = {"sub": "u", "https://site.example/role": "breast-radiology"}
    assert Flow(practice, provider, role_claim="https://site.example/role").finish()[0].roles == ("reader",)
    for groups in (["canteen"], [], None, 7, {"pacs-team": True}):
        provider.person = {"sub": "u", "groups": groups}
        assert Flow(practice, provider).finish()[0].roles == ()


HOUR = 3600
BENT: dict[str, dict[str, Any]] = {
    "another audience": {"aud": "another-client"},
    "also another audience": {"aud": [CLIENT, "another-client"]},
    "for another party": {"aud": [CLIENT, "another-client"], "azp": "another-client"},
    "no audience": {"aud": None},
    "another issuer": {"iss": "https://evil.example"},
    "no issuer": {"iss": None},
    "another log-in": {"nonce": "of another log-in"},
    "no nonce": {"nonce": None},
    "expired": {"exp": int(time.time()) - HOUR},
    "no end": {"exp": None},
    "an end that is no time": {"exp": "tomorrow"},
    "of the future": {"iat": int(time.time()) + HOUR},
    "not yet": {"nbf": int(time.time()) + HOUR},
    "nobody": {"sub": None},
}


@pytest.mark.parametrize("bent", BENT.values(), ids=BENT)
def test_refused_claims(practice: Practice, provider: OpenIdProvider, bent: dict[str, Any]) -> None:
    """A token for, by, of or at another one, or without saying so, vouches for nobody."""
    provider.bent = bent
    with pytest.raises(NotVouched):
        Flow(practice, provider).finish()


@pytest.mark.parametrize("signs", ["none", "HS256", "another key"])
def test_refused_signatures(practice: Practice, provider: OpenIdProvider, signs: str) -> None:
    """A token without signature, signed with the public key as a secret, or by another key vouches for nobody."""
    provider.signs = signs
    with pytest.raises(NotVouched, match="does not hold"):
        Flow(practice, provider).finish()


def test_a_token_that_is_none(practice: Practice, provider: OpenIdProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no token at all vouches for nobody."""
    for text in ("", "a.b.c", "a.b.c.d.e", "ümlaut", "." * 10_000):
        monkeypatch.setattr(provider, "token", lambda nonce, text=text: text)
        with pytest.raises(NotVouched):
            Flow(practice, provider).finish()


def test_an_answer_belongs_to_its_log_in(practice: Practice, provider: OpenIdProvider) -> None:
    """Another state, browser, provider or time, a code used twice, and a refusal all end the log-in."""
    flow = Flow(practice, provider)
    with pytest.raises(NotVouched, match="state"):
        flow.ours.finish(flow.begun.cookie, {**flow.answer, "state": "another"})
    with pytest.raises(NotVouched, match="state"):
        flow.ours.finish(Flow(practice, provider).begun.cookie, flow.answer)
    with pytest.raises(NotVouched, match="this browser"):
        flow.ours.finish("", flow.answer)
    altered = flow.begun.cookie[:-6] + "AAAA=="
    with pytest.raises(NotVouched, match="this browser"):
        flow.ours.finish(altered, flow.answer)
    with pytest.raises(NotVouched, match="iss"):
        flow.ours.finish(flow.begun.cookie, {**flow.answer, "iss": "https://evil.example"})
    with pytest.raises(NotVouched, match="access_denied"):
        flow.ours.finish(flow.begun.cookie, {"state": flow.answer["state"], "error": "access_denied"})
    assert provider.redeemed == 0, "nothing of this reached the provider"
    flow.finish()
    with pytest.raises(NotVouched, match="invalid_grant"):
        flow.finish()
    late = Flow(practice, provider)
    late.now += FLOW_SECONDS + 1
    with pytest.raises(NotVouched, match="too long"):
        late.finish()


def test_a_stolen_code_is_useless(practice: Practice, provider: OpenIdProvider) -> None:
    """Whoever has the code but not the verifier (PKCE), or not the client's secret, gets no token."""
    flow = Flow(practice, provider)
    thief = Flow(practice, provider)
    with pytest.raises(NotVouched, match="invalid_grant"):
        thief.ours.finish(thief.begun.cookie, {**thief.answer, "code": flow.answer["code"]})
    with pytest.raises(NotVouched, match="invalid_client"):
        Flow(practice, provider, secret="guessed").finish()
    provider.secret = ""
    assert Flow(practice, provider, secret="").finish()[0].name == "Ruth", "a public client has PKCE alone"


def test_a_key_of_the_provider_is_turned(practice: Practice, provider: OpenIdProvider) -> None:
    """A new key of the provider is found without a restart, and asked for at most once a minute."""
    flow = Flow(practice, provider)
    flow.finish()
    provider.turns_its_key()
    begun = flow.ours.begin("")
    back = httpx.get(begun.address, timeout=30).headers["location"]
    answer = {name: values[0] for name, values in parse_qs(urlsplit(back).query).items()}
    flow.now += 61
    assert flow.ours.finish(begun.cookie, answer)[0].name == "Ruth"


def test_a_provider_that_is_not_what_it_says(practice: Practice, provider: OpenIdProvider) -> None:
    """A provider that calls itself otherwise is not trusted; one that does not answer is a matter for later."""
    ours = Provider(registered(provider, issuer=provider.issuer + "/"), practice.vault)
    with pytest.raises(Untrusted, match="letter by letter"):
        ours.begin("")
    nowhere = Provider(registered(provider, issuer="http://127.0.0.1:1"), practice.vault)
    with pytest.raises(Transient, match="account of this site"):
        nowhere.begin("")


def test_a_provider_that_would_be_asked_in_the_open(
    practice: Practice, provider: OpenIdProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A provider reached by https must name https addresses, all of them; else codes and keys would travel readable."""
    names = ("authorization_endpoint", "token_endpoint", "jwks_uri")
    safe = dict.fromkeys(names, "https://idp.example/x")
    assert oidc.misplaced(safe, "https://idp.example") == []
    for name in names:
        assert oidc.misplaced({**safe, name: "http://idp.example/x"}, "https://idp.example") == [name]
        assert oidc.misplaced({**safe, name: None}, "https://idp.example") == [name]
    monkeypatch.setattr(provider, "says", {"jwks_uri": "ftp://127.0.0.1/keys"})
    with pytest.raises(Untrusted, match="without a safe jwks_uri"):
        Provider(registered(provider), practice.vault).begin("")


# -- on the pages


@pytest.fixture
def address(practice: Practice, provider: OpenIdProvider) -> Iterator[str]:
    # the pages' port is known only once they run: the registration is completed then
    ours = Provider(registered(provider), practice.vault)
    with served(practice.site(provider=ours)) as where:
        ours.registration = registered(provider, redirect=f"{where}/login/back")
        yield where


def goes_round(address: str, client: httpx.Client) -> httpx.Response:
    there = client.get("/login/provider")
    back = httpx.get(there.headers["location"], timeout=30).headers["location"]
    assert back.startswith(address)
    return client.get(back)


def test_comes_in_by_the_provider(address: str, practice: Practice, provider: OpenIdProvider) -> None:
    """A person comes in by the provider, roles follow the provider, and all of it is recorded."""
    client = httpx.Client(base_url=address, timeout=30)
    assert "Hospital log-in" in client.get("/login").text
    entered = goes_round(address, client)
    assert entered.status_code == 200
    assert client.get("/worklist").status_code == 200
    assert client.get("/operations").status_code == 403
    provider.person["groups"] = ["pacs-team"]
    goes_round(address, client)
    assert client.get("/operations").status_code == 200
    provider.person["preferred_username"] = "Ruth-Married"
    goes_round(address, client)
    assert [each.name for each in practice.people.accounts() if each.vouched] == ["ruth"], "known by subject, not name"
    provider.person["groups"] = ["canteen"]
    assert goes_round(address, httpx.Client(base_url=address, timeout=30)).status_code == 401
    practice.people.set_disabled("ruth", True, "ada")
    provider.person["groups"] = ["pacs-team"]
    assert goes_round(address, httpx.Client(base_url=address, timeout=30)).status_code == 401
    assert client.get("/worklist").status_code == 303, "disabling ended the session"
    kinds = [kind for kind, _ in practice.acts()]
    for kind in ("account made", "log-in", "roles changed", "log-in refused", "account disabled"):
        assert kind in kinds


def test_local_accounts_stay_apart(address: str, practice: Practice, provider: OpenIdProvider) -> None:
    """The provider gives nobody a local account; a person of the provider has no password here, and cannot get one."""
    provider.person = {"sub": "u-99", "preferred_username": "ada", "groups": ["breast-radiology"]}
    client = httpx.Client(base_url=address, timeout=30)
    refused = goes_round(address, client)
    assert refused.status_code == 401
    assert "administrator" in refused.text
    assert "set-cookie" not in refused.headers
    assert client.post("/login", data={"name": "ada", "password": PASSWORD}).status_code == 303, "still the default way"
    provider.person = {"sub": "u-5", "preferred_username": "oda", "groups": ["breast-radiology"]}
    goes_round(address, client)
    for password in ("", PASSWORD, "x"):
        answer = httpx.post(f"{address}/login", data={"name": "oda", "password": password}, timeout=30)
        assert answer.status_code in (401, 422)
    key = client.get("/account").text.split('name="form_key" value="')[1].split('"')[0]
    data = {"form_key": key, "before": "", "password": "Another good 1 password"}
    assert client.post("/account/password", data={**data, "before": "x"}).status_code == 403
    with pytest.raises(Exception, match="provider"):
        practice.people.set_password("oda", "Another good 1 password", "ada")
    with pytest.raises(Exception, match="provider"):
        practice.people.set_roles("oda", ("admin",), "ada")


def test_cookies_of_the_way(address: str, provider: OpenIdProvider) -> None:
    """The flow's cookie is sealed, short-lived and out of scripts' reach; the session's stays strict."""
    provider.person = {"sub": "u-20", "preferred_username": "cora", "groups": ["pacs-team"]}
    client = httpx.Client(base_url=address, timeout=30)
    there = client.get("/login/provider", params={"next": "//evil.example"})
    said = there.headers["set-cookie"].lower()
    assert {"httponly", "samesite=lax", "max-age=600", "path=/"} <= set(said.split("; "))
    asked = parse_qs(urlsplit(there.headers["location"]).query)
    for name in ("state", "nonce", "code_challenge"):
        assert len(asked[name][0]) >= 43
        assert asked[name][0] not in said
    entered = goes_round(address, httpx.Client(base_url=address, timeout=30))
    assert "evil" not in entered.text
    assert "samesite=strict" in entered.headers.get_list("set-cookie")[0].lower()


def test_a_forced_log_in(address: str, provider: OpenIdProvider) -> None:
    """A browser that is sent here with somebody else's code does not come in."""
    mine = httpx.Client(base_url=address, timeout=30)
    back = httpx.get(mine.get("/login/provider").headers["location"], timeout=30).headers["location"]
    victim = httpx.Client(base_url=address, timeout=30)
    assert victim.get(back).status_code == 401
    assert "busgen" not in victim.cookies
    assert provider.redeemed == 0


@pytest.mark.program
def test_in_a_browser(address: str, provider: OpenIdProvider, chromium: Any) -> None:
    """In a real browser the way leads over another site and ends, logged in, where one wanted to go."""
    provider.person = {"sub": "u-21", "preferred_username": "bea", "groups": ["breast-radiology"]}
    person = Person(chromium, address, "")
    person._stays_here = lambda url: None  # type: ignore[method-assign]
    person.wrong.clear()
    person.goes("/models")
    person.page.click("text=Hospital log-in")
    person.page.wait_for_url(lambda url: urlsplit(url).path == "/models")
    assert "bea" in person.sees(".tools")
    person.wrong = [said for said in person.wrong if not said.startswith("asked elsewhere")]
    person.done()


# -- settings


SITE = """
[site]
name = "A"
prevalence = 0.1
[listener]
allow = [{ ae_title = "US1" }]
[web]
address = "https://busgen.example"
[web.oidc]
issuer = "https://login.example"
client_id = "busgen-cds"
client_secret = "env:OIDC_SECRET"
[web.oidc.roles]
radiology = ["reader"]
"""


def test_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider is named in the settings, its secret by reference; half a registration is refused by name."""
    assert get_args(settings.RoleName) == ROLES
    file = tmp_path / settings.FILE

    def read(text: str) -> settings.Settings:
        file.write_text(text)
        return settings.read(file)

    chosen = read(SITE)

    class Opened:
        vault = None

    monkeypatch.delenv("OIDC_SECRET", raising=False)
    with pytest.raises(Misconfigured, match="env:OIDC_SECRET"):
        pages._provider(chosen, Opened())  # type: ignore[arg-type]
    monkeypatch.setenv("OIDC_SECRET", "sesame")
    made = pages._provider(chosen, Opened())  # type: ignore[arg-type]
    assert made is not None
    assert made.registration.redirect == "https://busgen.example/login/back"
    assert made.registration.secret == "sesame"
    assert "sesame" not in repr(made.registration)
    for old, new, named in (
        ('address = "https://busgen.example"', "", "web.address"),
        ('issuer = "https://login.example"', 'issuer = "http://login.example"', "issuer"),
        ('radiology = ["reader"]', 'radiology = ["king"]', "roles"),
        ('client_id = "busgen-cds"', 'client_id = "x"\nscopes = ["profile"]', "openid"),
        ('"env:OIDC_SECRET"', '"sesame"', "client_secret"),
    ):
        with pytest.raises(Misconfigured, match=named):
            read(SITE.replace(old, new))
