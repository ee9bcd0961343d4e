"""The schema's history. A new step: `python -m busgen_cds.store.migrations "what changes"`."""
