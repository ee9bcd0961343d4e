"""Pages and API: `create(site)` makes the application from everything it stands on, `Server` runs it."""

from busgen_cds.web.application import create
from busgen_cds.web.bench import Studio
from busgen_cds.web.entry import BACK
from busgen_cds.web.oidc import Provider, Registration
from busgen_cds.web.serving import Server
from busgen_cds.web.site import LiveBundle, Models, Node, Receives, Site

__all__ = [
    "BACK", "LiveBundle", "Models", "Node", "Provider", "Receives", "Registration", "Server", "Site", "Studio",
    "create",
]  # fmt: skip
