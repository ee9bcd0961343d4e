"""Hostile input by the hundred thousand: mutated objects through the readers, mutated associations at the listener.

Rules:
- A run is told by its seed: the same seed and number give the same bytes, on any machine.
- Mutations know the structure (elements, lengths, items, fragments, PDUs): random bytes alone are turned away at once.
- What is attacked runs in a process of its own under a watchdog, so that a crash or a hang is a finding.
- Four bars: no crash, nothing over five seconds, less than 200 MB of growth, nothing written outside the store.
"""
