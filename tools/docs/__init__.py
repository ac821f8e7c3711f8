"""The documentation as a site: pages, reference and figures, built by ``python tools/docs``."""
