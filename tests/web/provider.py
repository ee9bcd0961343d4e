"""A small OpenID provider on loopback that really signs: one person logs in there, and a test may bend its tokens."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Form, Request
from fastapi.responses import JSONResponse, RedirectResponse
from joserfc import jwt
from joserfc.jwk import KeySet, RSAKey

CLIENT, SECRET = "busgen-cds", "a secret of the two"


@dataclass
class OpenIdProvider:
    """Says of everybody who comes that it is `person`."""

    issuer: str = ""
    person: dict[str, Any] = field(
        default_factory=lambda: {"sub": "u-17", "preferred_username": "Ruth", "groups": ["breast-radiology"]}
    )
    bent: dict[str, Any] = field(default_factory=dict)  # claims put over the right ones; None takes one away
    signs: str = "RS256"
    refuses: str = ""
    says: dict[str, str] = field(default_factory=dict)  # of itself, in place of what is so
    answers_as: str = ""  # the issuer named beside the code
    codes: dict[str, dict[str, str]] = field(default_factory=dict)
    redeemed: int = 0
    secret: str = SECRET  # empty: a public client
    key: RSAKey = field(default_factory=lambda: RSAKey.generate_key(2048, {"kid": "first", "use": "sig"}))
    other: RSAKey = field(default_factory=lambda: RSAKey.generate_key(2048, {"kid": "first", "use": "sig"}))

    def turns_its_key(self) -> None:
        self.key = RSAKey.generate_key(2048, {"kid": secrets.token_hex(4), "use": "sig"})

    def token(self, nonce: str) -> str:
        now = int(time.time())
        claims = {"iss": self.issuer, "aud": CLIENT, "iat": now, "exp": now + 300, "nonce": nonce, **self.person}
        claims = {name: value for name, value in {**claims, **self.bent}.items() if value is not None}
        if self.signs == "none":
            return f"{_b64(json.dumps({'alg': 'none'}))}.{_b64(json.dumps(claims))}."
        if self.signs == "HS256":  # with our public key as if it were a secret between us
            said = f"{_b64(json.dumps({'alg': 'HS256', 'kid': 'first'}))}.{_b64(json.dumps(claims))}"
            return f"{said}.{_b64(hmac.digest(self.key.as_pem(private=False), said.encode(), 'sha256'))}"
        key = self.other if self.signs == "another key" else self.key
        return jwt.encode({"alg": "RS256", "kid": key.kid}, claims, key)

    def application(self) -> FastAPI:
        app = FastAPI()
        app.get("/.well-known/openid-configuration")(self._describe)
        app.get("/keys")(lambda: KeySet([self.key]).as_dict(private=False))
        app.get("/authorize")(self._authorize)
        app.post("/token")(self._redeem)
        return app

    def _describe(self) -> dict[str, str]:
        return {
            "issuer": self.issuer,
            "authorization_endpoint": f"{self.issuer}/authorize",
            "token_endpoint": f"{self.issuer}/token",
            "jwks_uri": f"{self.issuer}/keys",
            **self.says,
        }

    def _authorize(self, request: Request) -> RedirectResponse:
        asked = dict(request.query_params)
        assert asked["client_id"] == CLIENT
        assert asked["response_type"] == "code"
        assert "openid" in asked["scope"].split()
        assert asked["code_challenge_method"] == "S256"
        code = secrets.token_urlsafe(16)
        self.codes[code] = asked
        answer = f"error={self.refuses}" if self.refuses else f"code={code}"
        issuer = f"&iss={self.answers_as}" if self.answers_as else ""
        return RedirectResponse(f"{asked['redirect_uri']}?{answer}&state={asked['state']}{issuer}", 302)

    def _redeem(
        self,
        request: Request,
        code: Annotated[str, Form()],
        code_verifier: Annotated[str, Form()],
        redirect_uri: Annotated[str, Form()],
    ) -> JSONResponse:
        asked = self.codes.pop(code, None)
        basic = "Basic " + base64.b64encode(f"{CLIENT}:{self.secret}".encode()).decode()
        expected = basic if self.secret else None
        challenge = _b64(hashlib.sha256(code_verifier.encode()).digest())
        if request.headers.get("authorization") != expected:
            return JSONResponse({"error": "invalid_client"}, 401)
        if not asked or asked["code_challenge"] != challenge or asked["redirect_uri"] != redirect_uri:
            return JSONResponse({"error": "invalid_grant"}, 400)
        self.redeemed += 1
        answer = {"access_token": "x", "token_type": "Bearer", "id_token": self.token(asked["nonce"])}
        return JSONResponse(answer)


def _b64(data: str | bytes) -> str:
    raw = data.encode() if isinstance(data, str) else data
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


@contextmanager
def running() -> Iterator[OpenIdProvider]:
    """By another name than the pages have, so that a browser takes it for another site."""
    provider = OpenIdProvider()
    server = uvicorn.Server(uvicorn.Config(provider.application(), host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not server.started:
        assert time.monotonic() < until, "the provider did not start"
        time.sleep(0.02)
    provider.issuer = f"http://localhost:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield provider
    finally:
        server.should_exit = True
        thread.join(timeout=20)
