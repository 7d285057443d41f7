"""How the database grows, one file a step; applied by :mod:`gale.platform.migrate` when Gale starts."""
