"""What the laboratory's verbs share: their options, the data and the generator they name, a key that is used once.

Rules: torch is imported inside the verbs, so that a clinic's program starts without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from busgen_cds.learning.generator import Generator
    from busgen_cds.signing import KeySigner

console = Console()

Sources = Annotated[str, typer.Option(help="Comma-separated sources of the manifest.")]
Run = Annotated[Path, typer.Option("--out", help="Folder of the run; an unfinished run there goes on.")]
Queue = Annotated[Path, typer.Option("--out", help="Folder of the queue's runs.")]
Most = Annotated[int | None, typer.Option(help="Runs to do now; all without it.")]
Results = Annotated[Path, typer.Option(help="Where the page goes.")]
Data = Annotated[Path | None, typer.Option("--data", help="Folder with manifest.csv; BUSGEN_DATA without it.")]
Cache = Annotated[Path, typer.Option(help="Where prepared images are kept.")]
Weights = Annotated[Path | None, typer.Option("--generator", help="Folder of the generator; the package's without it.")]
Adapter = Annotated[Path | None, typer.Option(help="A few-shot adapter of that generator.")]
ImageNet = Annotated[Path | None, typer.Option("--init", help="ImageNet encoder (npz).")]
ReaderRun = Annotated[Path | None, typer.Option("--reader", help="Checkpoint of a reader trained on real images only.")]
RESULTS, CACHE = Path("docs/results"), Path("runs/cache")


def data_root(given: Path | None) -> Path:
    from busgen_cds.learning import data

    return given or data.default_root()


def open_generator(folder: Path | None, adapter: Path | None = None) -> Generator:
    from busgen_cds.learning import generator

    return generator.Generator.load(folder or generator.SHIPPED, adapter=adapter)


def key_used_once() -> KeySigner:
    """A key that is gone when this program ends."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from busgen_cds import signing

    return signing.KeySigner(Ed25519PrivateKey.generate())


def trust_in(signer: KeySigner, public: Path) -> None:
    """Write the public half, which is what a product trusts; once what it vouches for is there."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    public.parent.mkdir(parents=True, exist_ok=True)
    public.write_bytes(signer.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def compute_with(threads: int) -> None:
    """Threads of torch; 0: as many as it takes by itself."""
    import torch

    if threads:
        torch.set_num_threads(threads)
