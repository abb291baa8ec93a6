"""Settings for every test: no deadline on single examples, for shared machines pause at will."""

from hypothesis import settings

settings.register_profile("megabatch", deadline=None)
settings.load_profile("megabatch")
