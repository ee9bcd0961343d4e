"""Keys come from where the site says, and nothing that was touched opens."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from busgen_cds.errors import Misconfigured, Untrusted
from busgen_cds.store import vault
from busgen_cds.store.vault import CHUNK, SealedWriter, Vault

KEY = bytes(range(32))


def sealed_file(path: Path, data: bytes) -> bytes:
    writer = SealedWriter(path, KEY)
    writer.write(data)
    writer.sync()
    writer.close()
    return path.read_bytes()


def opened(sealed: bytes, key: bytes = KEY) -> bytes:
    return b"".join(vault.read_sealed(io.BytesIO(sealed), key))


def test_a_touched_file_does_not_open(tmp_path: Path) -> None:
    """A sealed file that was altered, cut at any chunk, lengthened or re-ordered does not open."""
    data = os.urandom(2 * CHUNK + 100)
    sealed = sealed_file(tmp_path / "f", data)
    assert opened(sealed) == data
    size = CHUNK + 16
    first, second, third = sealed[16 : 16 + size], sealed[16 + size : 16 + 2 * size], sealed[16 + 2 * size :]
    flipped = [
        sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :] for at in (0, 9, 16, 16 + size, len(sealed) - 1)
    ]
    cut = [sealed[:at] for at in (0, 8, 16, 16 + size, 16 + 2 * size, len(sealed) - 1)]
    moved = [sealed[:16] + second + first + third, sealed + third, sealed[:16] + first + third]
    for other in (*flipped, *cut, *moved):
        with pytest.raises(Untrusted):
            opened(other)
    with pytest.raises(Untrusted):
        opened(sealed, bytes(32))


def test_texts_and_keys() -> None:
    """Texts and keys open under the key they were sealed under, also as an older one, and under no other."""
    old, new = Vault(KEY), Vault(vault.new_key(), older=[KEY])
    assert new.open_text(old.seal_text("Ä^B")) == "Ä^B" and new.unwrap(old.wrap(KEY)) == KEY
    assert old.seal_text("a") != old.seal_text("a") and old.blind("a") == old.blind("a") in new.blinds("a")
    assert old.blind("a") != new.blind("a") != new.blind("b")
    for stranger in (new.seal_text("a"), b"", old.seal_text("a")[:-1] + b"x"):
        with pytest.raises(Untrusted):
            old.open_text(stranger)
    with pytest.raises(Untrusted):
        old.open(old.seal(b"a", b"here"), b"there")
    with pytest.raises(Misconfigured):
        Vault(b"short")


def test_key_file(tmp_path: Path) -> None:
    """The site key's file must be readable by its owner alone, and is never overwritten."""
    path = tmp_path / "key"
    vault.write_key_file(path)
    assert len(vault.key_source(f"file:{path}").keys()[0]) == 32
    with pytest.raises(FileExistsError):
        vault.write_key_file(path)
    path.chmod(0o640)
    with pytest.raises(Misconfigured, match="chmod 600"):
        vault.key_source(f"file:{path}").keys()
    with pytest.raises(Misconfigured, match="cannot be read"):
        vault.key_source(f"file:{path}-not").keys()


def test_key_from_environment_or_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """The site key comes from an environment variable or a command too; what is no key is Misconfigured."""
    monkeypatch.setenv("SITE_KEY", f"{KEY.hex()} {bytes(32).hex()}")
    assert vault.unlock(vault.key_source("env:SITE_KEY")).blind("a") == Vault(KEY).blind("a")
    command = f"{sys.executable} -c \"print('{KEY.hex()}')\""
    assert vault.key_source(f"command:{command}").keys() == (KEY,)
    monkeypatch.setenv("SITE_KEY", "abc")
    for wrong in ("env:SITE_KEY", "env:NOT_SET", "command:false", "command:not-a-program", "file:", "kms:x", ""):
        with pytest.raises(Misconfigured):
            vault.key_source(wrong).keys()
