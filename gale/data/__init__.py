"""Sources to packed token shards, each with a manifest."""
