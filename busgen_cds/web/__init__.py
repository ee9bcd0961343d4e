"""Pages and API: `create(site)` makes the application from everything it stands on."""

from busgen_cds.web.application import create
from busgen_cds.web.site import LiveBundle, Node, Site

__all__ = ["LiveBundle", "Node", "Site", "create"]
