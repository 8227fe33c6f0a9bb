"""Training loops. A trainer gets built objects and knows nothing of recipes or the registry."""
