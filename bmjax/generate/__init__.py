"""Generation of tokens: jitted prefill and decode with a key/value cache."""
