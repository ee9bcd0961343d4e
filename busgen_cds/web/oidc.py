"""Logging in by the hospital's own provider: OpenID Connect, the authorization code flow with PKCE.

Rules:
- A log-in belongs to the browser that began it: state, nonce and PKCE verifier travel sealed in a cookie of that
  browser, and hold for ten minutes.
- An identity token is believed only if a key of the provider signed it, with an algorithm of `ALGORITHMS`, and it is by
  the provider (iss), for us alone (aud, azp), for this log-in (nonce) and of now (exp, iat).
- Roles come from a claim by the site's own table, anew at each log-in; whoever gets none does not come in.
- The provider's word is taken about people only; accounts of this site's own never pass to a person of the provider.

OpenID Connect Core 1.0, 3.1; RFC 7636 (PKCE); RFC 9207 (the answer names its issuer).
"""

from __future__ import annotations

import base64
import binascii
import json
import secrets
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from authlib.common.errors import AuthlibBaseError
from authlib.oauth2.client import OAuth2Client
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet

from busgen_cds.errors import Transient, Untrusted
from busgen_cds.store.people import ROLES, Role, Vouched
from busgen_cds.store.vault import Vault

ALGORITHMS = ("RS256", "PS256", "ES256", "ES384", "EdDSA", "Ed25519")  # asymmetric: a shared secret vouches for nobody
FLOW_SECONDS = 600
SKEW = 60  # seconds between two clocks
PATIENCE = 5.0  # seconds for an answer of the provider
KEPT = 3600.0  # seconds for which its description and keys are kept
ASK_AGAIN = 60.0  # an unknown key is asked for, but not more often than this
_ABOUT = b"log-in by the provider"
_ADDRESSES = ("authorization_endpoint", "token_endpoint", "jwks_uri")


class NotVouched(Exception):
    """The provider did not vouch for whoever came back; the reason is for the record, not for them."""


@dataclass(frozen=True)
class Registration:
    """What the site and its provider agreed on."""

    issuer: str
    client_id: str
    redirect: str  # our own address, as registered there
    secret: str = field(default="", repr=False)  # empty: a public client, which PKCE protects
    label: str = "Hospital log-in"
    scopes: tuple[str, ...] = ("openid", "profile")
    name_claim: str = "preferred_username"
    role_claim: str = "groups"  # dots lead into objects: realm_access.roles
    roles: Mapping[str, tuple[Role, ...]] = field(default_factory=dict)  # a value of the claim → roles
    authority: Path | None = None  # whose certificates are believed; None: those of the system


@dataclass(frozen=True)
class Begun:
    """Where the browser is sent, and what it keeps meanwhile."""

    address: str
    cookie: str = field(repr=False)


class Provider:
    def __init__(self, registration: Registration, vault: Vault, clock: Callable[[], float] = time.time) -> None:
        self.registration, self._vault, self._clock = registration, vault, clock
        self._lock = threading.Lock()
        self._described: tuple[float, dict[str, Any]] | None = None
        self._keys: tuple[float, KeySet] | None = None

    # -- the two halves of a log-in

    def begin(self, to: str) -> Begun:
        state, nonce, verifier = (secrets.token_urlsafe(48) for _ in range(3))
        address, _ = self._client().create_authorization_url(
            self._describe()["authorization_endpoint"], state=state, code_verifier=verifier, nonce=nonce
        )
        flow = {"state": state, "nonce": nonce, "verifier": verifier, "to": to, "at": int(self._clock())}
        sealed = self._vault.seal(json.dumps(flow).encode(), _ABOUT)
        return Begun(address, base64.urlsafe_b64encode(sealed).decode())

    def finish(self, cookie: str, answer: Mapping[str, str]) -> tuple[Vouched, str]:
        """Who it is, and where they wanted to go; NotVouched says why not."""
        flow = self._flow(cookie)
        if not secrets.compare_digest(answer.get("state", "").encode(), flow["state"].encode()):
            raise NotVouched("the answer belongs to another log-in (state)")
        if answer.get("iss", self.registration.issuer) != self.registration.issuer:
            raise NotVouched("another provider answered (iss)")
        if "error" in answer or not answer.get("code"):
            raise NotVouched(f"the provider refused: {answer.get('error', 'no code')[:60]}")
        claims = self._claims(self._redeem(answer["code"], flow["verifier"]), flow["nonce"])
        return self._vouched(claims), flow["to"]

    def _flow(self, cookie: str) -> dict[str, Any]:
        try:
            flow: dict[str, Any] = json.loads(self._vault.open(base64.urlsafe_b64decode(cookie), _ABOUT))
        except (Untrusted, ValueError, binascii.Error):
            raise NotVouched("this browser began no log-in here") from None
        if not -SKEW <= self._clock() - flow["at"] <= FLOW_SECONDS:
            raise NotVouched("the log-in took too long")
        return flow

    # -- asking the provider

    def _trusted(self) -> ssl.SSLContext:
        authority = self.registration.authority
        return ssl.create_default_context(cafile=str(authority) if authority else None)

    def _client(self, session: httpx.Client | None = None) -> OAuth2Client:
        chosen = self.registration
        return OAuth2Client(
            session,
            chosen.client_id,
            scope=" ".join(chosen.scopes),
            redirect_uri=chosen.redirect,
            code_challenge_method="S256",
        )

    def _redeem(self, code: str, verifier: str) -> str:
        chosen, address = self.registration, self._describe()["token_endpoint"]
        we = httpx.BasicAuth(chosen.client_id, chosen.secret) if chosen.secret else httpx.Auth()
        named = {} if chosen.secret else {"client_id": chosen.client_id}
        try:
            with httpx.Client(timeout=PATIENCE, verify=self._trusted()) as session:
                tokens = self._client(session).fetch_token(
                    address, code=code, code_verifier=verifier, auth=we, grant_type="authorization_code", **named
                )
        except AuthlibBaseError as refused:
            raise NotVouched(f"the provider did not take the code: {refused.error}") from refused
        except (httpx.HTTPError, ValueError) as failed:
            raise self._silent(failed) from failed
        token = tokens.get("id_token")
        if not isinstance(token, str):
            raise NotVouched("the provider gave no identity token: the scope openid must be granted")
        return token

    def _describe(self) -> dict[str, Any]:
        """The provider's description of itself, which must be about the issuer that the site named."""
        with self._lock:
            if self._described and self._clock() - self._described[0] < KEPT:
                return self._described[1]
            found = self._get(f"{self.registration.issuer.rstrip('/')}/.well-known/openid-configuration")
            if found.get("issuer") != self.registration.issuer:
                raise Untrusted(
                    f"{self.registration.issuer} describes itself as {found.get('issuer')!r}: set web.oidc.issuer to "
                    "what the provider says, letter by letter, if that is the one you mean."
                )
            if wrong := misplaced(found, self.registration.issuer):
                raise Untrusted(
                    f"{self.registration.issuer} describes itself without a safe {wrong[0]}: codes, our secret and its "
                    "keys would travel readable. Have its description corrected."
                )
            self._described = (self._clock(), found)
            return found

    def _key_set(self, *, anew: bool = False) -> KeySet:
        with self._lock:
            age = self._clock() - self._keys[0] if self._keys else KEPT
            if self._keys and age < (ASK_AGAIN if anew else KEPT):
                return self._keys[1]
        address = self._describe()["jwks_uri"]
        try:
            keys = KeySet.import_key_set(self._get(address))  # type: ignore[arg-type]
        except (JoseError, ValueError, KeyError, TypeError) as broken:
            raise self._silent(broken) from broken
        with self._lock:
            self._keys = (self._clock(), keys)
        return keys

    def _get(self, address: str) -> dict[str, Any]:
        try:
            answer = httpx.get(address, timeout=PATIENCE, verify=self._trusted())
            answer.raise_for_status()
            found = answer.json()
        except (httpx.HTTPError, ValueError) as failed:
            raise self._silent(failed) from failed
        if not isinstance(found, dict):
            raise self._silent(TypeError(address))
        return found

    def _silent(self, why: Exception) -> Transient:
        return Transient(
            f"{self.registration.label} does not answer as it should ({type(why).__name__}): try again, or log in with "
            "an account of this site."
        )

    # -- what it says

    def _claims(self, token: str, nonce: str) -> dict[str, Any]:
        ours = self.registration.client_id
        rules = jwt.JWTClaimsRegistry(
            now=lambda: int(self._clock()),
            leeway=SKEW,
            iss={"essential": True, "value": self.registration.issuer},
            aud={"essential": True, "value": ours},
            sub={"essential": True},
            exp={"essential": True},
            iat={"essential": True},
            nonce={"essential": True, "value": nonce},
        )
        try:
            claims = self._opened(token).claims
            rules.validate(claims)
        except (JoseError, ValueError) as refused:
            raise NotVouched(f"the identity token does not hold: {refused}"[:200]) from refused
        party = claims.get("azp")
        if (party is None and claims["aud"] not in (ours, [ours])) or party not in (None, ours):
            raise NotVouched("the identity token is for somebody else too (azp)")
        return dict(claims)

    def _opened(self, token: str) -> jwt.Token:
        try:
            return jwt.decode(token, self._key_set(), algorithms=ALGORITHMS)
        except (JoseError, ValueError):  # signed by a key newer than those we know?
            return jwt.decode(token, self._key_set(anew=True), algorithms=ALGORITHMS)

    def _vouched(self, claims: Mapping[str, Any]) -> Vouched:
        chosen = self.registration
        name = claims.get(chosen.name_claim)
        said = _within(claims, chosen.role_claim)
        values = {said} if isinstance(said, str) else {each for each in said if isinstance(each, str)}
        given = {role for value in values for role in chosen.roles.get(value, ())}
        return Vouched(
            chosen.issuer,
            str(claims["sub"]),
            name if isinstance(name, str) else "",
            tuple(role for role in ROLES if role in given),
        )


def misplaced(described: Mapping[str, Any], issuer: str) -> list[str]:
    """Which of the provider's addresses are missing, or less safe than its own (OpenID Connect Discovery 3)."""
    schemes = ("https://",) if issuer.startswith("https://") else ("https://", "http://")
    return [name for name in _ADDRESSES if not str(described.get(name, "")).startswith(schemes)]


def _within(claims: Mapping[str, Any], path: str) -> Any:
    found: Any = claims.get(path)  # a claim's own name may have dots: https://site.example/roles
    if found is None:
        found = claims
        for part in path.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
    return found if isinstance(found, str | list) else []
