"""A local page on which a text is looked at with one setting after the other."""
