"""A site at work: what it runs by itself, what its people may ask of it, and what it sends to other sites.

Each module takes a site as `app` builds it; the command line and the pages say the same words to the same verbs here.
"""
