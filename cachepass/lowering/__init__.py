"""From a rewritten graph to something that runs fast."""
