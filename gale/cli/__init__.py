"""The gale command, one file a verb."""
